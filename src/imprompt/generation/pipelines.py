"""Loading a base as a diffusers pipeline, and what differs between bases when the pipeline is called.

:func:`load` makes the pipeline of a task, :func:`for_task` that of another task with the same weights.
Weights are read from safetensors only.
"""

from collections.abc import Collection
from functools import cache
from importlib.util import find_spec
from inspect import signature
from typing import Any

import diffusers

from imprompt import catalog, hub
from imprompt.catalog import licences
from imprompt.catalog.resolve import Source
from imprompt.errors import ImpromptError, ModelError, UsageError, first_line
from imprompt.generation.families import Base
from imprompt.io import check_path
from imprompt.schema.request import SCHEDULERS, Task
from imprompt.tensorfile import read_header
from imprompt.weights import silence_library_logging

_PARTS = (
    "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder",
    "feature_extractor",
)  # fmt: skip


def load(
    base: Base, task: Task, dtype: Any, quantize: str = "none", *, parts: Collection[str] = _PARTS
) -> Any:
    """The base's pipeline for a task, on the CPU, without what drawing does not need.

    ``dtype`` is a torch dtype; ``quantize`` as a request has it. Of a base with a UNet ``parts`` alone are
    loaded, the others are ``None``. Raises :class:`ModelError` when it is missing, damaged, of a kind that
    takes no image prompts, or cannot be had.
    """
    check(base, task)
    kind, name = base.kind, pipeline_class(base, task)
    options: dict[str, Any] = {"torch_dtype": dtype, **kind.unused}
    variant = "fp16" if _halves(base, dtype) else None
    try:
        with silence_library_logging():
            pipeline = getattr(diffusers, name)
            options |= _left_out(pipeline, parts)
            if quantize != "none":
                options[kind.denoiser] = _quantised(base, quantize, dtype, variant)
            if base.path is not None and base.path.is_file():
                pipe = _from_single_file(base, pipeline, options)
            else:
                pipe = pipeline.from_pretrained(base.source, variant=variant, use_safetensors=True, **options)
    except ImpromptError:
        raise
    except Exception as error:  # loaders raise nearly anything on damaged or absent files
        place = Source(base.name, base.path, base.source, kind="base")
        raise place.not_loaded(error, _about(base)) from error
    _check_denoiser(pipe, base, task)
    return _ready(pipe)


def check(base: Base, task: Task) -> None:
    """Raise what :func:`load` would, as far as it can be told before weights are read."""
    licence = base.row.licence if base.row else licences.KOLORS if base.family == "kolors" else ""
    licences.check(f"base '{base.name}'", licence)
    _check_channels(_stated_channels(base), base, task)
    pipeline_class(base, task)
    if (needs := base.kind.needs) is not None and find_spec(needs[0]) is None:
        raise ModelError(
            f"the text of base '{base.name}' is read by {needs[0]}: pip install 'imprompt[{needs[1]}]'."
        )
    if base.path is None:
        hub.fetch(base.source, "model_index.json", what=f"base '{base.name}'", about=_about(base))


def load_part(place: Source, model: Any, dtype: Any, **options: Any) -> Any:
    """A model that joins a pipeline (a control, a motion adapter), of one of diffusers' classes, on the CPU.

    Raises :class:`ModelError` when it is missing, damaged or cannot be had.
    """
    half = getattr(place.row, "half", False) and str(dtype) == "torch.float16"
    if place.path is None:
        options |= {"subfolder": place.inside or None, "revision": place.revision}
    try:
        with silence_library_logging():
            return model.from_pretrained(
                place.folder,
                torch_dtype=dtype,
                use_safetensors=True,
                variant="fp16" if half else None,
                **options,
            )
    except Exception as error:  # loaders raise nearly anything on damaged or absent files
        raise place.not_loaded(error) from error


def for_task(pipe: Any, base: Base, task: Task) -> Any:
    """The pipeline of another task around the same weights. Raises :class:`UsageError` if there is none."""
    kind = base.kind
    _check_denoiser(pipe, base, task)
    made = getattr(diffusers, pipeline_class(base, task))(
        **{name: part for name, part in pipe.components.items() if name != "safety_checker"}, **kind.unused
    )
    return _ready(made)


def pipeline_class(base: Base, task: Task) -> str:
    """Name of diffusers' pipeline for a task on the base. Raises :class:`UsageError` if there is none."""
    kind = base.kind
    if task not in kind.pipelines:
        raise UsageError(
            f"base '{base.name}' can {' and '.join(kind.pipelines)}, not {task}: diffusers has no pipeline "
            "for that."
        )
    return kind.pipelines[task]


@cache
def takes(pipeline: str, argument: str) -> bool:
    """Whether diffusers' pipeline of that name can be called with an argument."""
    with silence_library_logging():
        return argument in signature(getattr(diffusers, pipeline).__call__).parameters


def _ready(pipe: Any) -> Any:
    """The pipeline as requests call it."""
    pipe.set_progress_bar_config(disable=True)
    if type(pipe).__name__ == "ChromaInpaintPipeline":  # diffusers (0.42) reads it; Chroma has no such layer
        pipe.transformer.register_to_config(guidance_embeds=False)
    return pipe


def scheduler_for(pipe: Any, name: str | None) -> Any:
    """A new scheduler: the named one with the base's noise schedule, or the base's own for ``None``.

    Raises :class:`UsageError` for a named one on a base of the flow-matching kind.
    """
    own = pipe.scheduler
    if name is None:
        return type(own).from_config(own.config)
    if "FlowMatch" in type(own).__name__:
        raise UsageError(
            f"scheduler: '{name}' is for models that predict noise; this base has {type(own).__name__}."
        )
    class_name, options = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(own.config, **options)


# ---- private


def _left_out(pipeline: Any, parts: Collection[str]) -> dict[str, None]:
    """Constructor arguments of a class of pipelines that leave out all but ``parts``."""
    known = signature(pipeline.__init__).parameters
    return {part: None for part in _PARTS if part in known and part not in parts}


def _from_single_file(base: Base, pipeline: Any, options: dict[str, Any]) -> Any:
    kind = base.kind
    if kind.parts is None:
        return pipeline.from_single_file(base.source, **options)
    row = catalog.bases()[kind.parts]
    if kind.denoiser not in options:
        options[kind.denoiser] = getattr(diffusers, kind.model).from_single_file(
            base.source, config=row.repo, subfolder=kind.denoiser, torch_dtype=options["torch_dtype"]
        )
    return pipeline.from_pretrained(row.repo, use_safetensors=True, **options)


def _halves(base: Base, dtype: Any) -> bool:
    """Whether the files marked fp16 are read: where there are no others, or they are all that is needed."""
    if base.row is not None:
        return base.row.half_only or (base.row.half and str(dtype) == "torch.float16")
    found = [] if base.path is None else [file.name for file in base.path.glob("*/*.safetensors")]
    return bool(found) and all(".fp16" in name for name in found)


def _quantised(base: Base, quantize: str, dtype: Any, variant: str | None) -> Any:
    """The base's denoiser with its linear layers in fewer bits."""
    gguf = quantize.endswith(".gguf")
    package = "gguf" if gguf else "torchao"
    if gguf and not check_path(quantize, "quantize").is_file():
        raise ModelError(f"quantize: there is no file '{quantize}'.")
    if find_spec(package) is None:
        raise ModelError(f"quantize: '{quantize}' needs {package}: pip install 'imprompt[quantize]'.")
    if gguf:
        return _from_gguf(base, quantize, dtype)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kind, model = base.kind, getattr(diffusers, base.kind.model)
    config = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[quantize]()
    options = {"torch_dtype": dtype, "quantization_config": diffusers.TorchAoConfig(config)}
    if base.path is not None and base.path.is_file():
        return model.from_single_file(base.source, **options)
    return model.from_pretrained(
        base.source, subfolder=kind.denoiser, use_safetensors=True, variant=variant, **options
    )


def _from_gguf(base: Base, file: str, dtype: Any) -> Any:
    if base.path is not None and base.path.is_file():
        raise ModelError(
            f"quantize: '{file}' has no configuration; name a diffusers folder or hub id as --base, not a "
            "single file."
        )
    what = "UNet" if base.kind.denoiser == "unet" else "transformer"
    try:
        denoiser = getattr(diffusers, base.kind.model).from_single_file(
            str(check_path(file, "quantize")),
            config=base.source,
            subfolder=base.kind.denoiser,
            torch_dtype=dtype,
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
        )
    except Exception as error:  # the reader and the loader raise nearly anything
        raise ModelError(
            f"quantize: '{file}' is no {what} of base '{base.name}': {first_line(error)}"
        ) from error
    if any(weight.is_meta for weight in denoiser.parameters()):
        raise ModelError(f"quantize: '{file}' holds no whole {what} of base '{base.name}'.")
    return denoiser


def _stated_channels(base: Base) -> int:
    """Input channels of the denoiser as far as can be told before gigabytes are loaded; else 4."""
    if base.row is not None:
        return 9 if base.row.inpaint else 4
    if base.path is None:
        return 4
    if base.path.is_file():
        header, _ = read_header(base.path)
        _, shape = header.get("model.diffusion_model.input_blocks.0.0.weight", ("", (0, 4)))
        return shape[1]
    return int(Source("unet", base.path / "unet").config().get("in_channels") or 4)


def _check_denoiser(pipe: Any, base: Base, task: Task) -> None:
    """Check the denoiser's channels, if it is loaded."""
    if (denoiser := getattr(pipe, base.kind.denoiser)) is not None:
        _check_channels(denoiser.config.in_channels, base, task)


def _check_channels(channels: int, base: Base, task: Task) -> None:
    if base.kind.denoiser == "unet" and channels != 4 and task != "inpaint":
        other = "sdxl" if base.family == "sdxl" else "sd15"
        raise UsageError(
            f"base '{base.name}' is an inpainting model (its UNet takes {channels} channels) and cannot "
            f"{task}; use it with inpaint, or a plain base such as '{other}'."
        )


def _about(base: Base) -> str:
    if base.row is None:
        return ""
    return f"{base.row.note}, {base.row.gigabytes:g} GB, licence {base.row.licence}"
