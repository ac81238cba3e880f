"""LoRAs and textual inversion embeddings: found by name, and loaded into a base's pipeline.

diffusers and peft load them. This module resolves their names (a ``.safetensors`` file, a folder, or
``owner/name[/folder][/file.safetensors]`` of the hub) and refuses what would have no effect. A face
adapter's own LoRA is another thing: it comes and goes with the adapter.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from imprompt.catalog.resolve import Source, resolve
from imprompt.errors import ModelError, UsageError, first_line
from imprompt.io import check_path
from imprompt.schema.request import EmbeddingRef, LoraRef
from imprompt.weights import load_tensors


def add_loras(pipe: Any, refs: Sequence[LoraRef]) -> None:
    """Load LoRAs with their weights; all of them act.

    Raises :class:`ModelError` for files that are missing, no LoRA, or for another base.
    """
    if not refs:
        return
    if find_spec("peft") is None:
        raise ModelError("LoRAs are loaded by peft: pip install 'imprompt[lora]'.")
    names = [f"lora_{i}" for i in range(len(refs))]
    for name, ref in zip(names, refs, strict=True):
        found = find(ref.path, "LoRA")
        source, options = _loader_arguments(found)
        usual = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity(logging.CRITICAL)  # its list of all weights that do not fit
        try:
            pipe.load_lora_weights(source, adapter_name=name, use_safetensors=True, **options)
        except Exception as error:  # diffusers and peft raise nearly anything on what does not fit
            raise _not_loaded(found, error) from error
        finally:
            diffusers_logging.set_verbosity(usual)
        if name not in {each for part in pipe.get_list_adapters().values() for each in part}:
            raise ModelError(f"LoRA '{ref.path}' has no weights for this base; it is of another kind.")
    pipe.set_adapters(names, [ref.weight for ref in refs])


def _not_loaded(source: Source, error: Exception) -> ModelError:
    """The error for a LoRA that diffusers could not load."""
    if source.path is None and (isinstance(error, OSError) or _of_the_net(error)):
        return source.not_loaded(error)
    if source.path is None and not source.is_file and huggingface_hub.constants.HF_HUB_OFFLINE:
        return ModelError(
            f"LoRA '{source.name}': the hub cannot be asked (HF_HUB_OFFLINE is set); say which file, "
            f"{source.repo}/file.safetensors."
        )
    return ModelError(f"LoRA '{source.name}' cannot be used with this base: {first_line(error)}")


def add_embeddings(pipe: Any, refs: Sequence[EmbeddingRef]) -> None:
    """Teach the text encoders words of textual inversion.

    Raises :class:`ModelError` for files without such a word, or with one of another width.
    """
    encoders = {
        key: (encoder, getattr(pipe, f"tokenizer{end}"))
        for end, key in (("", "clip_l"), ("_2", "clip_g"))
        if (encoder := getattr(pipe, f"text_encoder{end}", None)) is not None
    }
    for ref in refs:
        path = _file_of(find(ref.path, "embedding"))
        found = load_tensors(path)
        token = ref.token or next((key for key in found if key.startswith("<")), path.stem)
        for key, values in _by_encoder(found, list(encoders), ref).items():
            encoder, tokenizer = encoders[key]
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


def _by_encoder(found: Mapping[str, Tensor], encoders: Sequence[str], ref: EmbeddingRef) -> dict[str, Tensor]:
    """The vectors of a word for each text encoder. Raises :class:`ModelError` when one has none."""
    if len(encoders) == 1 and len(found) == 1:
        return {encoders[0]: next(iter(found.values()))}
    if len(encoders) > 1 and found.keys() >= set(encoders):
        return {key: found[key] for key in encoders}
    kind = "one text encoder" if len(encoders) == 1 else f"both text encoders ({' and '.join(encoders)})"
    raise ModelError(
        f"embedding '{ref.path}' is not for this base, which needs {kind}; it holds "
        f"{', '.join(list(found)[:4])}."
    )


def find(name: str, what: str) -> Source:
    """Resolve the name of a LoRA or embedding; ``what`` says which in messages.

    Raises :class:`ModelError` for files other than ``.safetensors``, and when nothing has that name,
    :class:`UsageError` for a name with a weight as A1111 writes it.
    """
    weight = re.fullmatch(r"(.+):(\d*\.?\d+)", name)
    if weight is not None and what == "LoRA" and not check_path(name).exists():
        raise UsageError(f"LoRA '{name}': a weight is an option; write {weight[1]},weight={weight[2]}.")
    source = resolve(name, what, {}, "a .safetensors file, a folder or a hub id (owner/name[/file])")
    if source.is_file and not name.endswith(".safetensors"):
        raise ModelError(f"{what} '{name}' is no .safetensors file, and imprompt opens no pickles.")
    return source


def _of_the_net(error: Exception) -> bool:
    """Whether the hub's library, or the one below it, raised it."""
    return type(error).__module__.partition(".")[0] in ("huggingface_hub", "httpx", "httpcore", "requests")


def _loader_arguments(source: Source) -> tuple[str, dict[str, str]]:
    """Arguments of diffusers' loaders: folder or repository, and the file's name if it is known."""
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
