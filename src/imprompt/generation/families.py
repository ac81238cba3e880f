"""Base families as rows: pipelines by task, quirks, how they are recognised; and their loading.

:func:`find_base` and :func:`find_adapter` say what a name stands for without loading it; :func:`load` makes
a diffusers pipeline of it and :func:`for_task` one for another task around the same weights. Weights are read
from safetensors only. No other module names a pipeline class of diffusers' still pictures.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from imprompt import catalog, hub
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.catalog import BaseRow, FamilyRow, licences
from imprompt.catalog.resolve import Source, resolve
from imprompt.errors import ModelError, UsageError, first_line
from imprompt.io import fingerprint, read_json, sha256
from imprompt.schema.request import SCHEDULERS, Task
from imprompt.weights import read_header, silence_library_logging

# ---- the table


@dataclass(frozen=True)
class Kind:
    """A kind of base: which diffusers classes draw with it, and what is special about them."""

    families: tuple[str, ...]
    """Families of the catalogue that are of this kind unless their row says another."""
    pipelines: Mapping[Task, str]
    model: str
    """Class of the denoiser."""
    denoiser: str = "unet"
    """Name of the denoiser in a pipeline."""
    unused: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments that leave out what drawing does not need."""
    needs: tuple[str, str] | None = None
    """A Python package that its text is read with, and the extra that installs it."""
    distilled: bool = False
    """Whether the guidance scale is an input of the model, so that a negative text has no effect."""
    strength: bool = True
    """Whether editing starts from the noised picture; else the model is shown the picture beside."""
    multiple: int = 8
    """What width and height are multiples of."""
    single_file: str = ""
    """A key that only single-file checkpoints of this kind have."""
    parts: str | None = None
    """Base whose other parts go with a single file, which holds the denoiser alone."""
    inpaint_channels: bool = True
    """Whether a denoiser with further input channels is an inpainting model."""


_FLUX: Mapping[Task, str] = {
    "generate": "FluxPipeline", "edit": "FluxImg2ImgPipeline", "inpaint": "FluxInpaintPipeline",
}  # fmt: skip
KINDS: dict[str, Kind] = {
    "sd": Kind(
        ("emoji", "sd15", "sd21"),
        {
            "generate": "StableDiffusionPipeline",
            "edit": "StableDiffusionImg2ImgPipeline",
            "inpaint": "StableDiffusionInpaintPipeline",
        },
        "UNet2DConditionModel",
        unused={"safety_checker": None, "requires_safety_checker": False},
        single_file="input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    ),
    "sdxl": Kind(
        ("sdxl",),
        {
            "generate": "StableDiffusionXLPipeline",
            "edit": "StableDiffusionXLImg2ImgPipeline",
            "inpaint": "StableDiffusionXLInpaintPipeline",
        },
        "UNet2DConditionModel",
        unused={"add_watermarker": False},
        single_file="input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight",
    ),
    "kolors": Kind(
        ("kolors",),
        {"generate": "KolorsPipeline", "edit": "KolorsImg2ImgPipeline"},
        "UNet2DConditionModel",
        needs=("sentencepiece", "kolors"),
    ),
    "sd3": Kind(
        ("sd35",),
        {
            "generate": "StableDiffusion3Pipeline",
            "edit": "StableDiffusion3Img2ImgPipeline",
            "inpaint": "StableDiffusion3InpaintPipeline",
        },
        "SD3Transformer2DModel",
        denoiser="transformer",
        multiple=16,
        single_file="joint_blocks.0.x_block.attn.qkv.weight",
        parts="sd35",
        inpaint_channels=False,
    ),
    "chroma": Kind(
        ("chroma",),
        {
            "generate": "ChromaPipeline",
            "edit": "ChromaImg2ImgPipeline",
            "inpaint": "ChromaInpaintPipeline",
        },
        "ChromaTransformer2DModel",
        denoiser="transformer",
        multiple=16,
        single_file="distilled_guidance_layer.in_proj.weight",
        parts="chroma",
        inpaint_channels=False,
    ),
    "flux": Kind(
        ("flux",), _FLUX, "FluxTransformer2DModel", denoiser="transformer", distilled=True,
        multiple=16, single_file="double_blocks.0.img_attn.qkv.weight", parts="flux", inpaint_channels=False,
    ),
    "flux-kontext": Kind(
        (), {"generate": "FluxKontextPipeline", "edit": "FluxKontextPipeline",
             "inpaint": "FluxKontextInpaintPipeline"},
        "FluxTransformer2DModel", denoiser="transformer", distilled=True, multiple=16,
        inpaint_channels=False, strength=False,
    ),
    "flux-fill": Kind(
        (), {"inpaint": "FluxFillPipeline"}, "FluxTransformer2DModel", denoiser="transformer",
        distilled=True, multiple=16, inpaint_channels=False,
    ),
}  # fmt: skip
"""Sources: diffusers' pipelines; ``single_file`` from the published checkpoints."""


@dataclass(frozen=True)
class Defaults:
    """What a base is drawn with when a request leaves it open; ``defaults.json`` in its folder may say."""

    steps: int = 30
    guidance: float = 7.5
    size: int = 512
    """Side of the square it was trained on, in pixels; other proportions get that area."""
    scheduler: str | None = None
    """``None``: the base's own."""
    adapter: str | None = None


@dataclass(frozen=True)
class Base:
    """A base model by where it is."""

    name: str
    """As it was asked for."""
    source: str
    """Folder, single file, or hub repository."""
    row: BaseRow | None = None

    @property
    def path(self) -> Path | None:
        """The local folder or file; ``None`` for a repository."""
        path = Path(self.source)
        return path if path.exists() else None

    @cached_property
    def family(self) -> str | None:
        """The family whose adapters fit, by its row or files; ``None`` when neither tells."""
        if self.row is not None:
            return self.row.family
        if self.path is None:
            return None
        if self.path.is_file():
            kind, shape = _single_file(self.path)
            known = KINDS[kind].families if kind else ()
            widths = {row.cross_dim: name for name, row in catalog.families().items() if name in known}
            return known[0] if len(known) == 1 else widths.get(shape[-1] if shape else 0)
        return _family_of_folder(self.path)

    @cached_property
    def defaults(self) -> Defaults:
        """What it is drawn with by default: as its ``defaults.json`` says, else its row, else its family.

        Raises :class:`ModelError` when that file is damaged.
        """
        known = Defaults()
        if self.family is not None:
            row = catalog.families()[self.family]
            known = Defaults(row.steps, row.guidance, row.size, adapter=row.adapter)
        if self.row is not None:
            own = {name: getattr(self.row, name) for name in ("steps", "guidance")}
            known = replace(known, **{name: value for name, value in own.items() if value is not None})
        if self.path is None or not self.path.is_dir():
            return known
        if self.family is None and (side := _config(self.path / "unet").get("sample_size")):
            channels = _config(self.path / "vae").get("block_out_channels") or [0] * 4
            known = replace(known, size=int(side) * 2 ** (len(channels) - 1))
        path = self.path / "defaults.json"
        if not path.is_file():
            return known
        stated = read_json(path, f"'{path}'", error=ModelError)
        try:
            if unknown := sorted(stated.keys() - {each.name for each in fields(Defaults)}):
                raise ValueError(f"unknown {', '.join(unknown)}")
            return replace(known, **stated)
        except (ValueError, TypeError) as error:
            raise ModelError(f"'{path}' cannot be used: {error}.") from error

    @cached_property
    def kind(self) -> Kind:
        """Its row of :data:`KINDS`. Raises :class:`ModelError` for a model of another kind."""
        if self.row is not None:
            return KINDS[self.row.kind or _kind_of_family(self.row.family)]
        if self.path is not None and self.path.is_file():
            name, _ = _single_file(self.path)
            if not name:
                raise ModelError(
                    f"'{self.name}' is no checkpoint of a base that is known here (Stable Diffusion 1.5, XL "
                    "or 3.5, FLUX, Chroma): its denoiser's keys are not there. An adapter goes to --adapter, "
                    "not to --base."
                )
            return KINDS[name]
        index = Source(self.name, self.path, self.source).config("model_index.json")
        class_name = str(index.get("_class_name", ""))
        for kind in KINDS.values():
            if class_name in kind.pipelines.values():
                return kind
        raise ModelError(
            f"base '{self.name}' is a {class_name or 'folder without a class name'}; image prompts are drawn "
            f"with {' and '.join(each.pipelines.get('generate', '') for each in list(KINDS.values())[:6])}s."
        )

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Its weights' files on this machine."""
        if self.path is not None and self.path.is_file():
            return (self.path,)
        return self._files("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")

    @property
    def encoder_files(self) -> tuple[Path, ...]:
        """Files on this machine of the image encoder that comes with it, if one does."""
        return () if self.path is not None and self.path.is_file() else self._files("image_encoder")

    def _files(self, *parts: str) -> tuple[Path, ...]:
        if self.path is None:
            root, files = None, hub.cached_weights(self.source)
        else:
            root, files = self.path, sorted(self.path.rglob("*.safetensors"))
        inside = (file for file in files if file.parent.name in parts)
        return tuple(file for file in inside if root is None or file.parent.parent == root)

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hex digits that differ when a weight file differs; of a repository that is not here, of its
        name."""
        files = self.weight_files
        return fingerprint(*files) if files else hashlib.sha256(self.source.encode()).hexdigest()[:12]


# ---- names


def find_base(name: str) -> Base:
    """What a name stands for: an alias, a folder, a ``.safetensors`` file or a hub repository.

    Raises :class:`UsageError` for an unknown alias, :class:`ModelError` for a folder or file that is no base.
    """
    source = resolve(name, "base", catalog.bases(), "a folder, a .safetensors file or a hub id (owner/name)")
    row = source.row if isinstance(source.row, BaseRow) else None
    if source.path is not None and source.path.is_dir() and not (source.path / "model_index.json").is_file():
        raise ModelError(f"'{name}' is no base: a diffusers folder has a model_index.json, it has none.")
    if source.path is not None and source.path.is_file() and source.path.suffix != ".safetensors":
        raise ModelError(
            f"'{name}' is no .safetensors file, and imprompt opens no pickles. Convert the model to a "
            "diffusers folder or to safetensors first."
        )
    if source.path is None and source.inside and not source.is_file:
        raise ModelError(
            f"there is no base at '{name}': a folder, a .safetensors file or a hub id (owner/name) is "
            "expected."
        )
    if source.is_file and source.path is None:
        return Base(name, str(source.file(what=f"base '{name}'")))
    return Base(name, source.folder, row)


def find_adapter(name: str | None, base: Base) -> str:
    """The adapter that a request means: the one it names, or the default of the base.

    Raises :class:`UsageError` when nothing is named and the base is of no family with a default.
    """
    if name is None:
        name = base.defaults.adapter
        if name is None:
            raise UsageError(
                f"adapter: base '{base.name}' has no default adapter; name one that was made for it."
            )
    resolve(name, "adapter", catalog.adapters(), "a file, a folder or owner/name/file.safetensors of the hub")
    return name


def load_adapter(name: str) -> IPAdapter:
    """The adapter by alias, file, folder, or ``owner/name[/folder]/file.safetensors`` of the hub.

    Raises :class:`ModelError` when it is missing, damaged, a pickle, or not to be used here.
    """
    return IPAdapter.from_pretrained(name)


def adapter_file(name: str) -> Path:
    """The published file of an alias, its SHA-256 compared with the catalogue's.

    Raises :class:`UsageError` for an unknown name, :class:`ModelError` for what cannot be had or differs.
    """
    row = catalog.lookup(catalog.adapters(), name, "adapter", "a file")
    path = resolve(name, "adapter", catalog.adapters()).file(what=f"adapter '{name}'")
    if row.sha256 is not None and (found := sha256(path)) != row.sha256:
        raise ModelError(
            f"'{path}' is not the published {row.file} of {row.repo}: its sha256 is {found}, {row.sha256} "
            "was expected. Get it again."
        )
    return path


# ---- loading


def load(base: Base, task: Task, dtype: Any, quantize: str = "none") -> Any:
    """The base's pipeline for a task, on the CPU, without what drawing does not need.

    ``dtype`` is a torch dtype; ``quantize`` as a request has it. Raises :class:`ModelError` when it is
    missing, damaged, of a kind that takes no image prompts, or cannot be had.
    """
    licence = base.row.licence if base.row else licences.KOLORS if base.family == "kolors" else ""
    licences.check(f"base '{base.name}'", licence)
    kind = base.kind
    _check_channels(_stated_channels(base), base, task)
    name = _class_for(kind, task, base)
    if kind.needs is not None and find_spec(kind.needs[0]) is None:
        package, extra = kind.needs
        raise ModelError(
            f"the text of base '{base.name}' is read by {package}: pip install 'imprompt[{extra}]'."
        )
    if base.path is None:
        hub.fetch(base.source, "model_index.json", what=f"base '{base.name}'", about=_about(base))
    options: dict[str, Any] = {"torch_dtype": dtype, **kind.unused}
    variant = "fp16" if _halves(base, dtype) else None
    import diffusers

    try:
        with silence_library_logging():
            pipeline = getattr(diffusers, name)
            if quantize != "none":
                options[kind.denoiser] = _quantised(base, quantize, dtype, variant)
            if base.path is not None and base.path.is_file():
                pipe = _from_single_file(base, pipeline, options)
            else:
                pipe = pipeline.from_pretrained(base.source, variant=variant, use_safetensors=True, **options)
    except ModelError:
        raise
    except Exception as error:  # loaders raise nearly anything on damaged or absent files
        raise _not_loaded(base, error) from error
    pipe.set_progress_bar_config(disable=True)
    _check_channels(getattr(pipe, kind.denoiser).config.in_channels, base, task)
    return pipe


def for_task(pipe: Any, base: Base, task: Task) -> Any:
    """The pipeline of another task around the same weights. Raises :class:`UsageError` if there is none."""
    import diffusers

    kind = base.kind
    _check_channels(getattr(pipe, kind.denoiser).config.in_channels, base, task)
    made = getattr(diffusers, _class_for(kind, task, base))(
        **{name: part for name, part in pipe.components.items() if name != "safety_checker"}, **kind.unused
    )
    made.set_progress_bar_config(disable=True)
    return made


def guidance_arguments(base: Base, guidance: float, negatives: Sequence[str]) -> dict[str, Any]:
    """The pipeline's arguments for guidance, with one negative text for each picture.

    Raises :class:`UsageError` for a negative text that the base cannot follow.
    """
    call: dict[str, Any] = {"guidance_scale": guidance}
    if base.kind.distilled:
        if any(negatives):
            raise UsageError(
                f"negative: base '{base.name}' is guidance-distilled, so that a negative text has no effect; "
                "leave it out."
            )
        return call
    if guidance > 1:
        call["negative_prompt"] = list(negatives) if len(negatives) > 1 else negatives[0]
    return call


def scheduler_for(pipe: Any, name: str | None) -> Any:
    """A new scheduler: the named one with the base's noise schedule, or the base's own for ``None``.

    Raises :class:`UsageError` for a named one on a base of the flow-matching kind.
    """
    own = pipe.scheduler
    if name is None:
        return type(own).from_config(own.config)
    import diffusers

    if "FlowMatch" in type(own).__name__:
        raise UsageError(
            f"scheduler: '{name}' is for models that predict noise; this base has {type(own).__name__}."
        )
    class_name, options = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(own.config, **options)


# ---- private


def _kind_of_family(family: str) -> str:
    return next(name for name, kind in KINDS.items() if family in kind.families)


def _family_of_folder(path: Path) -> str | None:
    """The family that a diffusers folder's denoiser is of, by the width of its tokens."""
    unet, transformer = _config(path / "unet"), _config(path / "transformer")
    if unet:
        width, classes = unet.get("cross_attention_dim"), ("UNet2DConditionModel",)
    else:
        inner = transformer.get("num_attention_heads", 0) * transformer.get("attention_head_dim", 0)
        model = str(transformer.get("_class_name"))
        width = inner if model == "SD3Transformer2DModel" else transformer.get("joint_attention_dim")
        classes = (model,)

    def fits(row: FamilyRow) -> bool:
        kind = KINDS[_kind_of_family(row.name)]
        return (row.cross_dim, row.text_dim) == (width, unet.get("encoder_hid_dim")) and kind.model in classes

    return next((name for name, row in catalog.families().items() if fits(row)), None)


def _single_file(path: Path) -> tuple[str, tuple[int, ...]]:
    """The kind of a single-file checkpoint, empty if unknown, and the shape of the weight that tells."""
    header, _ = read_header(path)
    shapes = {key.removeprefix("model.diffusion_model."): shape for key, (_, shape) in header.items()}
    for name, kind in KINDS.items():
        if kind.single_file and kind.single_file in shapes:
            return name, shapes[kind.single_file]
    return "", ()


def _from_single_file(base: Base, pipeline: Any, options: dict[str, Any]) -> Any:
    kind = base.kind
    if kind.parts is None:
        return pipeline.from_single_file(base.source, **options)
    import diffusers

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
    import diffusers

    kind = base.kind
    model = getattr(diffusers, kind.model)
    file = quantize.endswith(".gguf")
    package = "gguf" if file else "torchao"
    path = Path(quantize).expanduser()
    if file and not path.is_file():
        raise ModelError(f"quantize: there is no file '{quantize}'.")
    if find_spec(package) is None:
        raise ModelError(f"quantize: '{quantize}' is read by {package}: pip install 'imprompt[quantize]'.")
    single = base.path is not None and base.path.is_file()
    options: dict[str, Any] = {"torch_dtype": dtype}
    what = "UNet" if kind.denoiser == "unet" else "transformer"
    if file:
        if single:
            raise ModelError(
                f"quantize: '{quantize}' has no configuration; name a diffusers folder or hub id as --base, "
                "not a single file."
            )
        options |= {"config": base.source, "subfolder": kind.denoiser}
        options["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
        try:
            denoiser = model.from_single_file(str(path), **options)
        except Exception as error:  # the reader and the loader raise nearly anything
            raise ModelError(
                f"quantize: '{quantize}' is no {what} of base '{base.name}': {first_line(error)}"
            ) from error
        if any(weight.is_meta for weight in denoiser.parameters()):
            raise ModelError(f"quantize: '{quantize}' holds no whole {what} of base '{base.name}'.")
        return denoiser
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kinds = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}
    options["quantization_config"] = diffusers.TorchAoConfig(kinds[quantize]())
    if single:
        return model.from_single_file(base.source, **options)
    return model.from_pretrained(
        base.source, subfolder=kind.denoiser, use_safetensors=True, variant=variant, **options
    )


def _class_for(kind: Kind, task: Task, base: Base) -> str:
    if task not in kind.pipelines:
        raise UsageError(
            f"base '{base.name}' can {' and '.join(kind.pipelines)}, not {task}: diffusers has no pipeline "
            "for that."
        )
    return kind.pipelines[task]


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
    return int(_config(base.path / "unet").get("in_channels") or 4)


def _check_channels(channels: int, base: Base, task: Task) -> None:
    if base.kind.inpaint_channels and channels != 4 and task != "inpaint":
        other = "sdxl" if base.family == "sdxl" else "sd15"
        raise UsageError(
            f"base '{base.name}' is an inpainting model (its UNet takes {channels} channels) and cannot "
            f"{task}; use it with inpaint, or a plain base such as '{other}'."
        )


def _about(base: Base) -> str:
    if base.row is None:
        return ""
    return f"{base.row.note}, {base.row.gigabytes:g} GB, licence {base.row.licence}"


def _not_loaded(base: Base, error: Exception) -> ModelError:
    if base.path is not None:
        return ModelError(f"base '{base.name}' cannot be loaded: {first_line(error)}")
    return hub.failure(f"base '{base.name}'", base.source, error, about=_about(base))


def _config(folder: Path) -> Mapping[str, Any]:
    return Source(folder.name, folder).config()
