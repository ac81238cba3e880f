"""Kinds of bases as rows of a table, and the base or adapter that a name stands for. Nothing is loaded.

A row has diffusers' pipelines by task, quirks, and how to recognise a checkpoint of this kind.
:func:`find_base` resolves a name; :mod:`imprompt.generation.pipelines` loads what it finds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from imprompt import catalog, hub
from imprompt.catalog import AdapterRow, BaseRow, ControlRow, FamilyRow, MotionRow
from imprompt.catalog.resolve import Source, fingerprint_of, resolve
from imprompt.errors import AdapterMismatch, ModelError, UsageError
from imprompt.io import read_json, sha256
from imprompt.schema.request import Task
from imprompt.tensorfile import read_header

# ---- the table


def stills(prefix: str, *tasks: Task) -> dict[Task, str]:
    """Class names of diffusers' pipelines for still pictures by task; without ``tasks`` for all three."""
    names: dict[Task, str] = {"generate": "", "edit": "Img2Img", "inpaint": "Inpaint"}
    return {task: f"{prefix}{names[task]}Pipeline" for task in tasks or names}


@dataclass(frozen=True)
class Kind:
    """A kind of base: which diffusers classes draw with it, and what is special about them."""

    pipelines: Mapping[Task, str]
    families: tuple[str, ...] = ()
    """Families of the catalogue that are of this kind, unless the base's row names another kind."""
    model: str = "UNet2DConditionModel"
    """Class of the denoiser."""
    unused: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments that leave out parts which drawing does not need."""
    needs: tuple[str, str] | None = None
    """A Python package that reads its text, and the extra that installs the package."""
    distilled: bool = False
    """Guidance-distilled: the guidance scale is an input of the model; classifier-free guidance, which
    reads a negative, has a scale of its own."""
    single_file: str = ""
    """A key that only single-file checkpoints of this kind have, from the published files."""
    parts: str | None = None
    """Base that completes a single file, if that contains the denoiser alone."""

    @property
    def denoiser(self) -> str:
        """Name of the denoiser in a pipeline."""
        return "unet" if self.model.startswith("UNet") else "transformer"

    @property
    def multiple(self) -> int:
        """Width and height are multiples of this number."""
        return 8 if self.denoiser == "unet" else 16

    def drawn_steps(self, steps: int, strength: float) -> int:
        """How many of the schedule's steps diffusers' pipelines draw at a strength."""
        share = min(steps * strength, steps)
        return int(share) if self.denoiser == "unet" else steps - int(steps - share)


_FLUX = "FluxTransformer2DModel"
KINDS: dict[str, Kind] = {
    "sd": Kind(
        stills("StableDiffusion"),
        ("emoji", "sd15", "sd21"),
        unused={"safety_checker": None, "requires_safety_checker": False},
        single_file="input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    ),
    "sdxl": Kind(
        stills("StableDiffusionXL"),
        ("sdxl",),
        unused={"add_watermarker": False},
        single_file="input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight",
    ),
    "kolors": Kind(stills("Kolors", "generate", "edit"), ("kolors",), needs=("sentencepiece", "kolors")),
    "sd3": Kind(
        stills("StableDiffusion3"),
        ("sd35",),
        "SD3Transformer2DModel",
        single_file="joint_blocks.0.x_block.attn.qkv.weight",
        parts="sd35",
    ),
    "chroma": Kind(
        stills("Chroma"),
        ("chroma",),
        "ChromaTransformer2DModel",
        single_file="distilled_guidance_layer.in_proj.weight",
        parts="chroma",
    ),
    "flux": Kind(
        stills("Flux"),
        ("flux",),
        _FLUX,
        distilled=True,
        single_file="double_blocks.0.img_attn.qkv.weight",
        parts="flux",
    ),
    "flux-kontext": Kind(
        stills("FluxKontext", "generate", "inpaint") | {"edit": "FluxKontextPipeline"},
        model=_FLUX,
        distilled=True,
    ),
    "flux-fill": Kind({"inpaint": "FluxFillPipeline"}, model=_FLUX, distilled=True),
}


@dataclass(frozen=True)
class Defaults:
    """Values for what a request leaves open; ``defaults.json`` in the base's folder may set them."""

    steps: int = 30
    guidance: float = 7.5
    size: int = 512
    """Side of the square it was trained on, in pixels; other proportions get the same area."""
    scheduler: str | None = None
    """``None``: the base's own."""
    adapter: str | None = None


@dataclass(frozen=True)
class Base:
    """A base model that was found, not loaded."""

    name: str
    """The name that was asked for."""
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
        """Its ``defaults.json``, else the values of its row or of the published base of its kind, else its
        family's.

        Raises :class:`ModelError` when that file is damaged.
        """
        if self.family is not None:
            family = catalog.families()[self.family]
            known = Defaults(family.steps, family.guidance, family.size, adapter=family.adapter)
        else:
            known = Defaults(size=_trained_size(self.path) or Defaults.size)
        if (row := self.row or self._published_alike()) is not None:
            own = {name: getattr(row, name) for name in ("steps", "guidance")}
            known = replace(known, **{name: value for name, value in own.items() if value is not None})
        return known if self.path is None else _stated_defaults(self.path / "defaults.json", known)

    @cached_property
    def kind(self) -> Kind:
        """Its row of :data:`KINDS`. Raises :class:`ModelError` for a model of another kind."""
        if self.row is not None:
            return KINDS[self.row.kind or _kind_of_family(self.row.family)]
        if self.path is not None and self.path.is_file():
            name, _ = _single_file(self.path)
            if not name:
                raise ModelError(
                    f"'{self.name}' is no checkpoint of a known base (Stable Diffusion 1.5, XL or 3.5, FLUX, "
                    "Chroma): it lacks their denoiser's keys. An adapter goes to --adapter, not to --base."
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

    def _published_alike(self) -> BaseRow | None:
        """The row of a base of the same kind, for a folder or file of a kind that a family's values do not
        fit: FLUX.1's Fill, Kontext, and [schnell], which has no layer that reads a guidance scale."""
        if self.path is None or self.family != "flux":
            return None
        name = next(name for name, kind in KINDS.items() if kind is self.kind)
        if self.path.is_file():
            shapes, _ = read_header(self.path)
            reads_guidance = any("guidance_in." in key for key in shapes)
        else:
            reads_guidance = bool(_config(self.path / "transformer").get("guidance_embeds"))
        return catalog.bases()[name if reads_guidance else "flux-schnell"]

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
        """Twelve hex digits, see :func:`fingerprint_of`."""
        return fingerprint_of(self.weight_files, self.source)


# ---- names


def find_base(name: str) -> Base:
    """The base that a name stands for: an alias, a folder, a ``.safetensors`` file or a hub repository.

    Raises :class:`UsageError` for an unknown alias, :class:`ModelError` for a folder or file that is no base.
    """
    expected = "a folder, a .safetensors file or a hub id (owner/name)"
    source = resolve(name, "base", catalog.bases(), expected)
    path = source.path
    if path is None and source.is_file:
        path = source.file(what=f"base '{name}'")
    if path is None:
        if source.inside:
            raise ModelError(f"there is no base at '{name}': {expected} is expected.")
    elif path.is_dir() and not (path / "model_index.json").is_file():
        raise ModelError(
            f"'{name}' is no base: a diffusers folder has a model_index.json, this one has none."
        )
    elif path.is_file() and path.suffix != ".safetensors":
        raise ModelError(
            f"'{name}' is no .safetensors file, and imprompt opens no pickles. Convert the model to a "
            "diffusers folder or to safetensors first."
        )
    row = source.row if isinstance(source.row, BaseRow) else None
    return Base(name, source.folder if path is None else str(path), row)


def find_adapter(name: str | None, base: Base) -> str:
    """The adapter to use: ``name``, or the base's default.

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


def fitting_adapter(name: str | None, base: Base) -> str:
    """:func:`find_adapter`. Raises :class:`AdapterMismatch` for an alias of another family, before its file
    is downloaded."""
    found = find_adapter(name, base)
    if (row := catalog.adapters().get(found)) is not None:
        check_family(f"adapter '{found}'", row, base)
    return found


def check_family(what: str, row: AdapterRow | ControlRow | MotionRow, base: Base) -> None:
    """Raise :class:`AdapterMismatch` for an adapter, control or motion adapter of another family of bases."""
    if base.family is None:
        return
    takes = catalog.families()[base.family].takes if isinstance(row, AdapterRow) else ()
    if row.family not in (base.family, *takes):
        raise AdapterMismatch(
            f"{what} is for {row.family} bases; base '{base.name}' is of the family {base.family}. See "
            "imprompt models."
        )


def trained_size(denoiser: Mapping[str, Any], vae: Mapping[str, Any], base: str) -> tuple[int | None, int]:
    """The side in pixels of the pictures that a denoiser was trained on, if its configuration tells, and the
    pixels to a side of a latent. Raises :class:`ModelError` for configurations that are damaged."""
    side, channels = denoiser.get("sample_size"), vae.get("block_out_channels")
    if not isinstance(side, int | None) or not isinstance(channels, list | None):
        raise ModelError(
            f"base '{base}': sample_size is {side!r}, block_out_channels {channels!r}; a number and a list "
            "are expected. Get it again."
        )
    factor = 2 ** (len(channels or range(4)) - 1)
    return (side * factor if side else None), factor


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


# ---- private


def _kind_of_family(family: str) -> str:
    return next(name for name, kind in KINDS.items() if family in kind.families)


def _trained_size(folder: Path | None) -> int | None:
    """Side in pixels of the pictures that a folder's denoiser was trained on, if its configuration tells."""
    if folder is None:
        return None
    denoiser = _config(folder / "unet") or _config(folder / "transformer")
    return trained_size(denoiser, _config(folder / "vae"), str(folder))[0]


def _stated_defaults(path: Path, known: Defaults) -> Defaults:
    """``known`` with the values of a ``defaults.json``, if there is one."""
    if not path.is_file():
        return known
    stated = read_json(path, f"'{path}'", error=ModelError)
    try:
        if unknown := sorted(stated.keys() - {each.name for each in fields(Defaults)}):
            raise ValueError(f"unknown {', '.join(unknown)}")
        return replace(known, **stated)
    except (ValueError, TypeError) as error:
        raise ModelError(f"'{path}' cannot be used: {error}.") from error


def _family_of_folder(path: Path) -> str | None:
    """The family of a diffusers folder, by its denoiser's class and the width of its tokens."""
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


def _config(folder: Path) -> Mapping[str, Any]:
    return Source(folder.name, folder).config()
