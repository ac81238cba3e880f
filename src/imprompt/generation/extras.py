"""LoRAs and textual inversion embeddings: found by name, and loaded into a base's pipeline.

diffusers and peft do the work; here names are resolved (a ``.safetensors`` file, a folder, or
``owner/name[/folder][/file.safetensors]`` of the hub) and what would have no effect is refused. A face
adapter's own LoRA is another thing: it comes and goes with the adapter.
"""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from imprompt.catalog.resolve import Source, resolve
from imprompt.errors import ModelError, UsageError, first_line
from imprompt.schema.request import EmbeddingRef, LoraRef
from imprompt.weights import load_tensors


def add_loras(pipe: Any, refs: Sequence[LoraRef]) -> None:
    """Load LoRAs with their weights; all of them act.

    Raises :class:`ModelError` for what is missing, no LoRA, or made for another base.
    """
    if not refs:
        return
    if find_spec("peft") is None:
        raise ModelError("LoRAs are loaded by peft: pip install 'imprompt[lora]'.")
    from diffusers.utils import logging as diffusers_logging

    names = [f"lora_{i}" for i in range(len(refs))]
    for name, ref in zip(names, refs, strict=True):
        source, options = _loader_arguments(find(ref.path, "LoRA"))
        usual = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity(logging.CRITICAL)  # its list of all weights that do not fit
        try:
            pipe.load_lora_weights(source, adapter_name=name, use_safetensors=True, **options)
        except Exception as error:  # diffusers and peft raise nearly anything on what does not fit
            raise ModelError(
                f"LoRA '{ref.path}' cannot be used with this base: {first_line(error)}"
            ) from error
        finally:
            diffusers_logging.set_verbosity(usual)
        if name not in {each for part in pipe.get_list_adapters().values() for each in part}:
            raise ModelError(f"LoRA '{ref.path}' has no weights for this base; it is of another kind.")
    pipe.set_adapters(names, [ref.weight for ref in refs])


def add_embeddings(pipe: Any, refs: Sequence[EmbeddingRef]) -> None:
    """Teach the text encoders words of textual inversion.

    Raises :class:`ModelError` for files that hold no such word, or one of another width.
    """
    encoders: list[tuple[Any, Any, str]] = [
        (getattr(pipe, f"text_encoder{end}", None), getattr(pipe, f"tokenizer{end}", None), mark)
        for end, mark in (("", "clip_l"), ("_2", "clip_g"))
    ]
    encoders = [each for each in encoders if each[0] is not None]
    for ref in refs:
        path = _file_of(find(ref.path, "embedding"))
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


def find(name: str, what: str) -> Source:
    """Where a LoRA or embedding is; ``what`` names it in messages.

    Raises :class:`ModelError` for a file that is no ``.safetensors`` and when there is nothing of that name.
    """
    source = resolve(name, what, {}, "a .safetensors file, a folder or a hub id (owner/name[/file])")
    if source.is_file and not name.endswith(".safetensors"):
        raise ModelError(f"{what} '{name}' is no .safetensors file, and imprompt opens no pickles.")
    return source


def _loader_arguments(source: Source) -> tuple[str, dict[str, str]]:
    """What diffusers' loaders are given: folder or repository, and the file's name where one is known."""
    if source.path is not None:
        path = source.path
        return (str(path.parent), {"weight_name": path.name}) if path.is_file() else (str(path), {})
    folder, _, file = source.inside.rpartition("/") if source.is_file else (source.inside, "", "")
    if file:  # fetched here, where time-outs and messages are ours
        path = source.file(what=f"LoRA '{source.name}'")
        return str(path.parent), {"weight_name": path.name}
    return source.repo, {"subfolder": folder} if folder else {}


def _file_of(source: Source) -> Path:
    if source.path is None and not source.is_file:
        raise UsageError(f"embedding '{source.name}': say which file, {source.repo}/file.safetensors.")
    return source.file(what=f"embedding '{source.name}'")
