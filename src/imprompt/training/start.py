"""The start of a run: the frozen base, its image encoder, and the adapter with its first weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.adapter.init import copied_keys_values
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.adapter.lora import new_lora
from imprompt.catalog.resolve import Source
from imprompt.checkpoints.contents import by_section
from imprompt.checkpoints.locate import encoder_note
from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.face_onnx import OnnxFaces
from imprompt.errors import UsageError
from imprompt.generation.families import Base, find_base, trained_size
from imprompt.generation.pipelines import check, load
from imprompt.io import check_path
from imprompt.projections.build import new_projection
from imprompt.projections.shapes import HEAD_WIDTH
from imprompt.tensorfile import open_tensors
from imprompt.training.cache import ClipFeatures, FeatureEncoder
from imprompt.training.config import Kind, TrainConfig
from imprompt.training.faces import FaceFeatures
from imprompt.training.folder import WEIGHT_NAME

FEATURES: dict[str, tuple[str, ...]] = {
    "linear": ("pooled",),
    "plus": ("hidden",),
    "full": ("hidden",),
    "faceid": ("face",),
    "faceid-plus": ("face", "hidden"),
}
TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
"""Parts of a pipeline that read text."""
_CHECKPOINT = "checkpoint-*.safetensors"
_FACE_DEPTH = 4
"""Blocks of a new FaceID-PlusV2 resampler."""


def find_unet_base(name: str) -> Base:
    """The base of that name, not loaded.

    Raises :class:`UsageError` for one without a UNet and for one that only inpaints (adapters of its plain
    base fit it), :class:`ModelError` for one that is missing."""
    base = find_base(name)
    if base.kind.denoiser != "unet":
        raise UsageError(
            f"base '{name}' has no UNet; adapters are trained on bases that have one (Stable Diffusion 1.5, "
            "2.1 and XL, Kolors)."
        )
    check(base, "generate")  # a base that is missing is told before an adapter that is
    return base


def load_parts(base: Base, dtype: torch.dtype, *parts: str) -> Any:
    """The base's pipeline on the CPU with these parts alone. Raises :class:`ModelError` for one that cannot
    be loaded."""
    return load(base, "generate", dtype, parts=parts)


def own_side(base: Base) -> tuple[int, int]:
    """The side in pixels of the squares that the base was trained on, and pixels to a side of a latent."""
    place = Source(base.name, base.path, base.source, kind="base")
    published = base.row is not None and base.path is None  # the catalogue knows it; nothing is downloaded
    unet, vae = ({} if published else place.config(f"{part}/config.json") for part in ("unet", "vae"))
    side, factor = trained_size(unet, vae, base.name)
    return side or base.defaults.size, factor


def load_start(config: TrainConfig, base: Base) -> IPAdapter | None:
    """The adapter that ``config.init`` names; ``None`` for new weights.

    ``auto`` is the base's default adapter, where its kind is the one asked for. Raises :class:`ModelError` or
    :class:`UsageError` for what is missing or of another kind.
    """
    name = base.defaults.adapter if config.init == "auto" else config.init
    if name is None or name == "new":
        return None
    adapter = _named(name)
    if config.kind in (None, kind_of(adapter)):
        if config.tokens not in (None, adapter.checkpoint.tokens):
            raise UsageError(
                f"tokens is {config.tokens}, but the start '{name}' has {adapter.checkpoint.tokens}; leave "
                "tokens out, or begin with new weights (--init new)."
            )
        return adapter
    if config.init == "auto":
        return None
    raise UsageError(
        f"'{name}' is of the kind '{kind_of(adapter)}' and reads {adapter.projection.feature} features; "
        f"kind '{config.kind}' trains on {' and '.join(FEATURES[config.kind or 'linear'])}."
    )


def kind_of(adapter: IPAdapter) -> Kind:
    """The kind of an adapter, by its variant."""
    variant = adapter.checkpoint.variant
    if variant.reads_faces:
        return "faceid-plus" if adapter.projection.patch_width is not None else "faceid"
    return "linear" if variant.feature == "pooled" else "plus" if variant.name == "resampler" else "full"


def new_adapter(config: TrainConfig, kind: Kind, unet: Any, widths: tuple[int, ...]) -> IPAdapter:
    """An adapter with new weights by the run's seed: a random projection, and keys and values copied from
    the text's; for faces also a LoRA that adds nothing yet. ``widths`` are those of the features.

    faceid-plus is PlusV2: its tokens are the face's, plus what the crop's patches add."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if kind in ("linear", "plus"):
            named: Any = "resampler" if kind == "plus" else kind
            return IPAdapter.new(unet, kind=named, feature_width=widths[0], tokens=config.tokens)
        layers = cross_attentions(unet)
        cross, lora = layers[0].cross_dim, dict[str, Tensor]()
        if kind == "full":
            variant = "full-face"
            projection = new_projection(
                variant, {"proj.0.weight": (widths[0], widths[0]), "proj.3.weight": (cross,)}
            )
        else:
            variant = "faceid" if kind == "faceid" else "faceid-plusv2"
            projection = new_projection(variant, _face_shapes(cross, config.tokens or 4, *widths))
            lora = new_lora(unet, layers, config.lora_rank)
    weights = lora | copied_keys_values(unet, layers)
    return IPAdapter.from_state_dict({"image_proj": projection, "ip_adapter": weights}, variant=variant)


def widths(negative: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The width of each feature."""
    return tuple(int(tensor.shape[-1]) for tensor in negative.values())


def trainable(adapter: IPAdapter, config: TrainConfig, unet: Any) -> list[torch.nn.Parameter]:
    """Mark and return the parameters to train: all, or the projection and the layers of ``config.layers``.

    Raises :class:`UsageError` when no layer has such a name."""
    adapter.module.requires_grad_(True).train()
    if config.layers:
        layers = cross_attentions(unet)
        chosen = [layer.index for layer in layers if any(part in layer.name for part in config.layers)]
        if not chosen:
            names = sorted({layer.name.partition(".transformer")[0] for layer in layers})
            raise UsageError(f"layers: none has {' or '.join(config.layers)} in its name; there are {names}.")
        for layer in layers:
            if layer.index not in chosen:
                adapter.key_value(layer.index).requires_grad_(False)
    return [parameter for parameter in adapter.parameters() if parameter.requires_grad]


def feature_encoder(
    config: TrainConfig,
    kind: Kind,
    base: Base,
    initial: IPAdapter | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[FeatureEncoder, str]:
    """The encoder of references on the device, and the name of its image encoder, empty if it has none.

    Raises :class:`UsageError` when a model that the kind needs is not named and does not come with the base
    or the start."""
    names = FEATURES[kind]
    if kind == "faceid":
        return FaceFeatures(_face_reader(config, kind)), ""
    reader = _face_reader(config, kind) if "face" in names else None
    encoder = _image_encoder(config, base, initial, dtype).to(device)
    name = encoder_note(config.image_encoder or encoder.name)
    return ClipFeatures(encoder, names[0]) if reader is None else FaceFeatures(reader, encoder), name


def _face_reader(config: TrainConfig, kind: Kind) -> OnnxFaces:
    if config.face_model is None:
        raise UsageError(f"kind '{kind}' reads faces: name a folder of models with face_model.")
    return OnnxFaces.from_folder(config.face_model)


def _image_encoder(
    config: TrainConfig, base: Base, initial: IPAdapter | None, dtype: torch.dtype
) -> ImageEncoder:
    """The image encoder: the named one, the base's own, or that of the start."""
    if config.image_encoder is not None:
        return ImageEncoder.from_pretrained(config.image_encoder, torch_dtype=dtype)
    if base.path is None or base.path.is_dir():  # a single file holds none, and is large to open for nothing
        pipe = load_parts(base, dtype, "image_encoder", "feature_extractor")
        if (own := getattr(pipe, "image_encoder", None)) is not None:
            name = getattr(own.config, "_name_or_path", "") if base.path else f"{base.source}:image_encoder"
            return ImageEncoder(own, pipe.feature_extractor, name=name or None)
    found = None if initial is None else initial.image_encoder
    if initial is None or not isinstance(found, ImageEncoder):
        raise UsageError(
            f"base '{config.base}' has no image encoder of its own; name one with image_encoder, such as "
            "h94/IP-Adapter:models/image_encoder."
        )
    initial.image_encoder = None  # or it would stay in memory during the run
    return found.to(dtype=dtype)


def _face_shapes(cross: int, tokens: int, face: int, patch: int | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of a FaceID projection, of PlusV2's with ``patch``, the width of the crop's patches; the inner
    widths are the published ones."""
    shapes: dict[str, tuple[int, ...]] = {
        "proj.0.weight": (2 * face, face),
        "proj.2.weight": (tokens * cross, 2 * face),
        "norm.weight": (cross,),
    }
    if patch is None:
        return shapes
    heads = HEAD_WIDTH * max(1, cross // HEAD_WIDTH)
    inside = {"proj_in.weight": (cross, patch), "proj_out.weight": (cross, cross)}
    inside["layers.0.1.1.weight"] = (4 * cross, cross)
    inside |= {f"layers.{block}.0.to_q.weight": (heads, cross) for block in range(_FACE_DEPTH)}
    return shapes | {f"perceiver_resampler.{name}": shape for name, shape in inside.items()}


def _named(name: str) -> IPAdapter:
    path = check_path(name)
    if path.is_dir() and not (path / WEIGHT_NAME).exists():
        path = max(path.glob(_CHECKPOINT), default=path)
    if path.is_file() and path.match(_CHECKPOINT) and (found := _from_checkpoint(path)) is not None:
        return found
    return IPAdapter.from_pretrained(name)


def _from_checkpoint(path: Path) -> IPAdapter | None:
    """The adapter inside a training checkpoint: its averaged weights, if it has any. ``None`` for a file of
    that name that is none. Raises :class:`ModelError` for a damaged one."""
    state: dict[str, Tensor] = {}
    with open_tensors(path) as file:
        names, about = set(file.keys()), file.metadata() or {}
        for name in sorted(name for name in names if name.startswith("weights.")):
            own = name.removeprefix("weights.")
            averaged = f"averaged.{own}"
            state[own] = file.get_tensor(averaged if averaged in names else name)
    if not state:
        return None
    adapter = IPAdapter.from_state_dict(by_section(state, path.stem), variant=about.get("variant"))
    adapter.checkpoint = replace(adapter.checkpoint, name=path.stem)
    return adapter
