"""Names to models: which base and adapter a request means, what they like, and the loaded diffusers pipeline.

``find_base`` and ``find_adapter`` say what a name stands for without loading it; ``load`` makes a pipeline of
it and ``for_task`` the same model's pipeline for another task, sharing every weight. Weights are read from
safetensors only. The hub is asked only for what was asked for, through its cache, and not at all under
``HF_HUB_OFFLINE``.
"""

import hashlib
import json
import re
import struct
import warnings
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.catalog import licences
from imprompt.catalog.entries import ADAPTERS, BASES, BUNDLED, DEFAULT_ADAPTERS, BaseRow, Family, named
from imprompt.checkpoints.files import digest
from imprompt.errors import ModelError, UsageError, first_line
from imprompt.schema.request import SCHEDULERS, Task

EMOJI = Path(__file__).parents[1] / "assets" / "emoji"
"""The bundled model's folder."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PIPELINES: dict[str, dict[Task, str]] = {
    "StableDiffusion": {
        "generate": "StableDiffusionPipeline",
        "edit": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
    },
    "StableDiffusionXL": {
        "generate": "StableDiffusionXLPipeline",
        "edit": "StableDiffusionXLImg2ImgPipeline",
        "inpaint": "StableDiffusionXLInpaintPipeline",
    },
    "Kolors": {"generate": "KolorsPipeline", "edit": "KolorsImg2ImgPipeline"},
}
_NOT_NEEDED: dict[str, dict[str, Any]] = {
    "StableDiffusion": {"safety_checker": None, "requires_safety_checker": False},
    "StableDiffusionXL": {"add_watermarker": False},
    "Kolors": {},
}
_KINDS: dict[Family, str] = {"sdxl": "StableDiffusionXL", "kolors": "Kolors"}
_KOLORS_TEXT = 4096  # width of Kolors' text before its UNet's own projection; the rest is SDXL's


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


_OF_FAMILY: dict[Family, Defaults] = {
    "emoji": Defaults(steps=20, guidance=3.0, size=128, adapter=DEFAULT_ADAPTERS["emoji"]),
    "sd15": Defaults(size=512, adapter=DEFAULT_ADAPTERS["sd15"]),
    "sd21": Defaults(size=768),
    "sdxl": Defaults(guidance=5.0, size=1024, adapter=DEFAULT_ADAPTERS["sdxl"]),
    "kolors": Defaults(guidance=5.0, size=1024, adapter="kolors-plus"),
}


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
    def family(self) -> Family | None:
        """What its adapters must be made for, from its row or files; ``None`` when neither tells."""
        if self.row is not None:
            return self.row.family
        if self.path is None:
            return None
        unet = _config(self.path / "unet")
        if unet.get("encoder_hid_dim") == _KOLORS_TEXT:
            return "kolors"
        width = _single_file_shape(self.path, _SINGLE_WIDTH, 1) or unet.get("cross_attention_dim")
        families: dict[object, Family] = {256: "emoji", 768: "sd15", 1024: "sd21", 2048: "sdxl"}
        return families.get(width)

    @cached_property
    def defaults(self) -> Defaults:
        """What the base likes: its ``defaults.json``, else its family's. Raises :class:`ModelError` when that
        is damaged."""
        known = _OF_FAMILY[self.family] if self.family else Defaults()
        if self.path is None or not self.path.is_dir():
            return known
        if self.family is None and (side := _config(self.path / "unet").get("sample_size")):
            channels = _config(self.path / "vae").get("block_out_channels") or [0] * 4
            known = replace(known, size=int(side) * 2 ** (len(channels) - 1))
        place = self.path / "defaults.json"
        if not place.is_file():
            return known
        try:
            stated = json.loads(place.read_text(encoding="utf-8"))
            unknown = sorted(stated.keys() - {field.name for field in fields(Defaults)})
            if unknown:
                raise ValueError(f"unknown {', '.join(unknown)}")
            return replace(known, **stated)
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"'{place}' cannot be used: {error}.") from error

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hex digits that differ when a weight file differs in name, size or start; repositories by
        name."""
        digest = hashlib.sha256()
        for file in _weight_files(self.path) if self.path else ():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(1 << 20))
        return (digest if self.path else hashlib.sha256(self.source.encode())).hexdigest()[:12]


def find_base(name: str) -> Base:
    """What a name stands for: an alias, a folder, a ``.safetensors`` file or a hub repository.

    Raises :class:`UsageError` for an unknown alias, :class:`ModelError` for a folder or file that is no base.
    """
    if name in BASES:
        row = BASES[name]
        if row.repo == BUNDLED:
            _check_bundled(EMOJI / "model_index.json")
            return Base(name, str(EMOJI), row)
        return Base(name, row.repo, row)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelError(f"'{name}' is no base: a diffusers folder has a model_index.json, it has none.")
        return Base(name, str(path))
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(
                f"'{name}' is no .safetensors file, and imprompt opens no pickles. Convert the model to a "
                "diffusers folder or to safetensors first."
            )
        return Base(name, str(path))
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return Base(name, name, next((row for row in BASES.values() if row.repo == name), None))
    if "/" in name or path.suffix:
        raise ModelError(f"there is no base at '{name}': no folder, no .safetensors file.")
    named(BASES, name, "base", "a folder, a .safetensors file or a hub id (owner/name)")
    raise AssertionError("named raises for names it does not know")


def load(base: Base, task: Task, dtype: Any, quantize: str = "none") -> Any:
    """The base's pipeline for a task, on the CPU, without what drawing does not need.

    ``dtype`` is a torch dtype; ``quantize`` as a request has it. Raises :class:`ModelError` when it is
    missing, damaged, of a kind that takes no image prompts, or cannot be had offline.
    """
    licence = base.row.licence if base.row else licences.KOLORS if base.family == "kolors" else ""
    licences.check(f"base '{base.name}'", licence)
    kind = _pipeline_kind(base)
    _check_channels(_stated_channels(base), base, task)
    name = _class_for(kind, task, base)
    if kind == "Kolors" and find_spec("sentencepiece") is None:
        raise ModelError("Kolors' text is read by sentencepiece: pip install 'imprompt[kolors]'.")
    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True, **_NOT_NEEDED[kind]}
    try:
        import diffusers

        hush()
        pipeline = getattr(diffusers, name)
        variant = "fp16" if _halves(base, dtype) else None
        if quantize != "none":
            options["unet"] = _quantised(base, quantize, dtype, variant)
        if base.path is not None and base.path.is_file():
            del options["use_safetensors"]
            pipe = pipeline.from_single_file(base.source, **options)
        else:
            pipe = pipeline.from_pretrained(base.source, variant=variant, **options)
    except ModelError:
        raise
    except Exception as error:  # loaders raise nearly anything on damaged or absent files
        raise ModelError(_why_not(base, error)) from error
    pipe.set_progress_bar_config(disable=True)
    _check_channels(pipe.unet.config.in_channels, base, task)
    return pipe


def for_task(pipe: Any, base: Base, task: Task) -> Any:
    """The pipeline of another task around the same weights. Raises :class:`UsageError` if it cannot be."""
    import diffusers

    _check_channels(pipe.unet.config.in_channels, base, task)
    kind = _pipeline_kind(base)
    made = getattr(diffusers, _class_for(kind, task, base))(
        **{name: part for name, part in pipe.components.items() if name != "safety_checker"},
        **_NOT_NEEDED[kind],
    )
    made.set_progress_bar_config(disable=True)
    return made


def scheduler_for(pipe: Any, name: str | None) -> Any:
    """A fresh scheduler: the named one with the base's noise schedule, or the base's own for ``None``."""
    own = pipe.scheduler
    if name is None:
        return type(own).from_config(own.config)
    import diffusers

    class_name, options = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(own.config, **options)


def find_adapter(name: str | None, base: Base) -> str:
    """The adapter a request means: its own word, or the default of the base.

    Raises :class:`UsageError` when nothing is said and the base is of no family with a default.
    """
    if name is None:
        name = base.defaults.adapter
        if name is None:
            raise UsageError(
                f"adapter: base '{base.name}' has no default adapter; name one that was made for it."
            )
    if name not in ADAPTERS and not Path(name).exists() and name.count("/") < 1:
        if Path(name).suffix:
            raise ModelError(f"there is no adapter file '{name}'.")
        named(ADAPTERS, name, "adapter", "a file, a folder or owner/name/file.safetensors of the hub")
    return name


def load_adapter(name: str) -> IPAdapter:
    """The adapter by alias, file, folder, or ``owner/name[/folder]/file.safetensors`` of the hub. Raises
    :class:`ModelError` when it is missing, damaged, a pickle or not to be used here."""
    if name in ADAPTERS:
        row = ADAPTERS[name]
        if row.repo == BUNDLED:
            _check_bundled(EMOJI / row.file)
            return IPAdapter.from_pretrained(EMOJI / row.file)
        licences.check(f"adapter '{name}'", row.licence)
        folder, _, file = row.file.rpartition("/")
        if row.pickled:
            raise ModelError(
                f"adapter '{name}' is a pickle where it is published ({row.repo}, {row.file}), and drawing "
                f"opens none. Once: imprompt convert {name} {Path(file).stem}.safetensors, then --adapter "
                "that file."
            )
        encoder = row.encoder if ":" in row.encoder else None
        return IPAdapter.from_pretrained(
            row.repo, subfolder=folder or None, weight_name=file, image_encoder=encoder
        )
    if Path(name).expanduser().exists():
        return IPAdapter.from_pretrained(Path(name).expanduser())
    owner, _, rest = name.partition("/")
    repo, _, inside = rest.partition("/")
    if not inside:
        raise ModelError(
            f"adapter '{name}' is no file here; for one of the hub say which: {name}/file.safetensors."
        )
    folder, _, file = inside.rpartition("/")
    return IPAdapter.from_pretrained(f"{owner}/{repo}", subfolder=folder or None, weight_name=file)


def adapter_file(name: str) -> Path:
    """The published file of an alias, from the hub or its cache, its SHA-256 compared with the catalogue's.

    Raises :class:`UsageError` for an unknown name, :class:`ModelError` for what cannot be had or differs.
    """
    from huggingface_hub import hf_hub_download

    row = named(ADAPTERS, name, "adapter", "a file")
    licences.check(f"adapter '{name}'", row.licence)
    try:
        path = EMOJI / row.file if row.repo == BUNDLED else Path(hf_hub_download(row.repo, row.file))
    except Exception as error:  # the hub's client raises nearly anything
        raise ModelError(
            f"adapter '{name}' ({row.repo}, {row.file}) cannot be had: {first_line(error)}"
        ) from error
    if row.sha256 is not None and (found := digest(path)) != row.sha256:
        raise ModelError(
            f"'{path}' is not the published {row.file} of {row.repo}: its sha256 is {found}, {row.sha256} "
            "was expected. Get it again."
        )
    return path


# ---- private


def _halves(base: Base, dtype: Any) -> bool:
    """Whether the files marked fp16 are read: where there are no others, or they are all that is needed."""
    if base.row is not None:
        return base.row.half_only or (base.row.half and str(dtype) == "torch.float16")
    found = [] if base.path is None else [file.name for file in (base.path / "unet").glob("*.safetensors")]
    return bool(found) and all(".fp16" in name for name in found)


def _quantised(base: Base, quantize: str, dtype: Any, variant: str | None) -> Any:
    """The base's UNet with its linear layers in fewer bits."""
    from diffusers import GGUFQuantizationConfig, TorchAoConfig, UNet2DConditionModel

    file = quantize.endswith(".gguf")
    package = "gguf" if file else "torchao"
    path = Path(quantize).expanduser()
    if file and not path.is_file():
        raise ModelError(f"quantize: there is no file '{quantize}'.")
    if find_spec(package) is None:
        raise ModelError(f"quantize: '{quantize}' is read by {package}: pip install 'imprompt[quantize]'.")
    single = base.path is not None and base.path.is_file()
    options: dict[str, Any] = {"torch_dtype": dtype}
    if file:
        if single:
            raise ModelError(
                f"quantize: '{quantize}' has no configuration; name a diffusers folder or hub id as --base, "
                "not a single file."
            )
        options |= {"config": base.source, "subfolder": "unet"}
        options["quantization_config"] = GGUFQuantizationConfig(compute_dtype=dtype)
        try:
            unet = UNet2DConditionModel.from_single_file(str(path), **options)
        except Exception as error:  # the reader and the loader raise nearly anything
            raise ModelError(
                f"quantize: '{quantize}' is no UNet of base '{base.name}': {first_line(error)}"
            ) from error
        if any(weight.is_meta for weight in unet.parameters()):
            raise ModelError(f"quantize: '{quantize}' holds no whole UNet of base '{base.name}'.")
        return unet
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kinds = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}
    options["quantization_config"] = TorchAoConfig(kinds[quantize]())
    if single:
        return UNet2DConditionModel.from_single_file(base.source, **options)
    return UNet2DConditionModel.from_pretrained(
        base.source, subfolder="unet", use_safetensors=True, variant=variant, **options
    )


def _class_for(kind: str, task: Task, base: Base) -> str:
    if task not in _PIPELINES[kind]:
        raise UsageError(
            f"base '{base.name}' is a {kind} model, which can {' and '.join(_PIPELINES[kind])}, not {task}."
        )
    return _PIPELINES[kind][task]


_SINGLE_FIRST = "model.diffusion_model.input_blocks.0.0.weight"
_SINGLE_WIDTH = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"


def _pipeline_kind(base: Base) -> str:
    if base.row is not None:
        return _KINDS.get(base.row.family, "StableDiffusion")
    if base.path is not None and base.path.is_file():
        width = base.family
        if width is None:
            raise ModelError(
                f"'{base.name}' is no Stable Diffusion checkpoint of the 1.5 or XL family: its UNet's keys "
                "are not there. An adapter goes to --adapter, not to --base."
            )
        return _KINDS.get(width, "StableDiffusion")
    index = _config(base.path, "model_index.json") if base.path else _hub_index(base)
    class_name = str(index.get("_class_name", ""))
    for kind, tasks in _PIPELINES.items():
        if class_name in tasks.values():
            return kind
    raise ModelError(
        f"base '{base.name}' is a {class_name or 'folder without a class name'}; image prompts are drawn "
        f"with {' and '.join(_PIPELINES)} models."
    )


def hush() -> None:
    """Silence what the libraries say about loading: bars of a tenth of a second, deprecations of their own.

    Downloads keep their progress bars, which are the hub's.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*torch_dtype.*is deprecated.*")
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")


def _hub_index(base: Base) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(base.source, "model_index.json"))
    except Exception as error:
        raise ModelError(_why_not(base, error)) from error
    return _config(path.parent, path.name)


def _stated_channels(base: Base) -> int:
    """Input channels of the UNet as far as can be told before gigabytes are loaded; else 4."""
    if base.row is not None:
        return 9 if base.row.inpaint else 4
    if base.path is None:
        return 4
    if base.path.is_file():
        return _single_file_shape(base.path, _SINGLE_FIRST, 1) or 4
    return int(_config(base.path / "unet").get("in_channels") or 4)


def _check_channels(channels: int, base: Base, task: Task) -> None:
    if channels != 4 and task != "inpaint":
        other = "sdxl" if base.family == "sdxl" else "sd15"
        raise UsageError(
            f"base '{base.name}' is an inpainting model (its UNet takes {channels} channels) and cannot "
            f"{task}; use it with inpaint, or a plain base such as '{other}'."
        )


def _check_bundled(path: Path) -> None:
    if not path.is_file():
        raise ModelError(
            f"the bundled model is incomplete: '{path.name}' is missing. Install imprompt again."
        )


def _why_not(base: Base, error: Exception) -> str:
    reason = first_line(error)
    if base.path is not None:
        return f"base '{base.name}' cannot be loaded: {reason}"
    what = f"{base.row.note}, licence {base.row.licence}" if base.row else "a hub repository"
    return (
        f"base '{base.name}' ({base.source}: {what}) cannot be had from the hub or its cache: {reason} "
        "Look at the network and HF_HUB_OFFLINE, or give a local folder."
    )


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    try:
        read = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _single_file_shape(path: Path, pattern: str, axis: int) -> int | None:
    """One side of a weight in a single-file checkpoint, from its header alone; ``None`` if not there."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length < 100_000_000 else {}
    except (OSError, ValueError, struct.error):
        return None
    for block in (1, 4):  # SDXL has no attention in its first blocks
        entry = header.get(pattern.format(block))
        if isinstance(entry, dict):
            return int(entry["shape"][axis])
    return None


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    return sorted(file for part in parts for file in (path / part).glob("*.safetensors"))
