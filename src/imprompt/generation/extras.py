"""What is put into a loaded base before it draws: the user's LoRAs, and words of textual inversion.

diffusers and peft do the work; here names are read (a ``.safetensors`` file, a folder, or
``owner/name[/file.safetensors]`` of the hub) and what has no effect is refused. A face adapter's own LoRA is
none of these: it comes and goes with the adapter.
"""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from imprompt.checkpoints.files import load_tensors
from imprompt.errors import ModelError, UsageError, first_line
from imprompt.schema.request import EmbeddingRef, LoraRef


def add_loras(pipe: Any, refs: Sequence[LoraRef]) -> None:
    """Load LoRAs with their weights, all of them active. Raises :class:`ModelError` for what is missing, no
    LoRA, or made for another base."""
    if not refs:
        return
    if find_spec("peft") is None:
        raise ModelError("LoRAs are loaded by peft: pip install 'imprompt[lora]'.")
    from diffusers.utils import logging as said

    names = [f"lora_{i}" for i in range(len(refs))]
    for name, ref in zip(names, refs, strict=True):
        source, options = _place(ref.path, "LoRA")
        usual = said.get_verbosity()
        said.set_verbosity(logging.CRITICAL)  # its list of all weights that do not fit
        try:
            pipe.load_lora_weights(source, adapter_name=name, use_safetensors=True, **options)
        except Exception as error:  # diffusers and peft raise nearly anything on what does not fit
            raise ModelError(
                f"LoRA '{ref.path}' cannot be used with this base: {first_line(error)}"
            ) from error
        finally:
            said.set_verbosity(usual)
        if name not in {each for part in pipe.get_list_adapters().values() for each in part}:
            raise ModelError(f"LoRA '{ref.path}' has no weights for this base; it is of another kind.")
    pipe.set_adapters(names, [ref.weight for ref in refs])


def add_embeddings(pipe: Any, refs: Sequence[EmbeddingRef]) -> None:
    """Teach the text encoders words of textual inversion. Raises :class:`ModelError` for files that hold no
    such word or one of another width."""
    encoders: list[tuple[Any, Any, str]] = [
        (getattr(pipe, f"text_encoder{end}", None), getattr(pipe, f"tokenizer{end}", None), mark)
        for end, mark in (("", "clip_l"), ("_2", "clip_g"))
    ]
    encoders = [each for each in encoders if each[0] is not None]
    for ref in refs:
        path = Path(ref.path).expanduser()
        if not path.is_file():
            source, options = _place(ref.path, "embedding")
            path = _download(source, options)
        found = load_tensors(path)
        token = ref.token or next((key for key in found if key.startswith("<")), path.stem)
        for encoder, tokenizer, mark in encoders:
            values = found.get(mark) if len(encoders) > 1 else next(iter(found.values()))
            if values is None or (len(encoders) == 1 and len(found) != 1):
                kind = "both text encoders (clip_l and clip_g)" if len(encoders) > 1 else "one text encoder"
                raise ModelError(
                    f"embedding '{ref.path}' is not for this base, which needs {kind}; it holds "
                    f"{', '.join(list(found)[:4])}."
                )
            width = encoder.get_input_embeddings().weight.shape[-1]
            if values.shape[-1] != width:
                raise ModelError(
                    f"embedding '{ref.path}' has width {values.shape[-1]}, this base's text encoder {width}; "
                    "it was made for another base."
                )
            try:
                pipe.load_textual_inversion({token: values}, text_encoder=encoder, tokenizer=tokenizer)
            except Exception as error:  # such as a word that is known already
                raise ModelError(f"embedding '{ref.path}' cannot be used: {first_line(error)}") from error


def _place(name: str, what: str) -> tuple[str, dict[str, str]]:
    """Folder or repository, and the file's name where one is said."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(f"{what} '{name}' is no .safetensors file, and imprompt opens no pickles.")
        return str(path.parent), {"weight_name": path.name}
    if path.is_dir():
        return str(path), {}
    owner, _, rest = name.partition("/")
    repo, _, inside = rest.partition("/")
    if not repo or name.startswith((".", "/", "~")) or (not inside and repo.endswith(".safetensors")):
        raise UsageError(
            f"there is no {what} '{name}': no file, no folder and no hub id (owner/name[/file])."
        )
    folder, _, file = inside.rpartition("/")
    options = {"weight_name": file} if file else {}
    return f"{owner}/{repo}", options | ({"subfolder": folder} if folder else {})


def _download(repo: str, options: dict[str, str]) -> Path:
    from huggingface_hub import hf_hub_download

    if "weight_name" not in options:
        raise UsageError(f"embedding '{repo}': say which file, {repo}/file.safetensors.")
    try:
        return Path(hf_hub_download(repo, options["weight_name"], subfolder=options.get("subfolder")))
    except Exception as error:  # the hub's client raises nearly anything
        raise ModelError(f"embedding '{repo}' cannot be had: {first_line(error)}") from error
