"""``imprompt embed``: pictures in, a file of their features out, for use wherever a picture is."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imprompt.errors import ModelError, UsageError

if TYPE_CHECKING:
    from imprompt.adapter.ipadapter import IPAdapter
    from imprompt.encoders.clip import ImageEncoder
    from imprompt.generation.families import Base


def embed(
    pictures: Sequence[str | Path],
    output: str | Path,
    *,
    encoder: str | None = None,
    base: str = "emoji",
    adapter: str | None = None,
    framing: str = "crop",
    sharpen: float = 0.0,
    face_model: str | None = None,
    face: str = "largest",
) -> Path:
    """Encode ``pictures`` and write their features, or for a face adapter their faces; returns the path.

    The encoder is ``encoder`` (a folder, or ``repo:folder``), else the one of ``adapter``, else that of the
    base's default adapter. Raises :class:`UsageError`, :class:`InputError` and :class:`ModelError`; the file
    appears whole or not at all.
    """
    from imprompt.encoders import face as faces
    from imprompt.encoders.clip import ImageEncoder
    from imprompt.encoders.features import Saved, fingerprint, save
    from imprompt.encoders.framing import encode
    from imprompt.encoders.images import content_hash, load_image
    from imprompt.generation.families import find_adapter, find_base, hush, load_adapter
    from imprompt.schema import options as words

    framing = words.canonical("framing", framing, words.FRAMINGS)
    if Path(output).suffix.lower() != ".safetensors":
        raise UsageError(f"--output '{output}': features are written as .safetensors.")
    decoded = [load_image(picture) for picture in pictures]
    if encoder is not None and adapter is not None:
        raise UsageError("--encoder and --adapter both say which encoder to use; give one.")
    hush()
    if encoder is None:
        found = find_base(base)
        loaded = load_adapter(find_adapter(adapter, found))
        if loaded.projection.variant.embedding is not None:
            if face_model is not None:
                loaded.face_embedder = face_model
            if loaded.projection.patch_width is not None:
                _beside(loaded, found)
            shown = loaded.encode(decoded, framing, face=face)
            return faces.save(shown, output, [content_hash(picture) for picture in decoded])  # type: ignore[arg-type]
        tower = _beside(loaded, found)
    else:
        tower = ImageEncoder.from_pretrained(encoder)
    if face_model is not None or face != "largest":
        raise UsageError("--face-model, --face: have no effect without a face adapter; name one (--adapter).")
    features = encode(tower, decoded, framing, sharpen=sharpen)
    hashes = tuple(content_hash(picture) for picture in decoded)
    return save(Saved(features, tower.name, fingerprint(tower.model), hashes, framing), output)


def encoder_of(encoder: str | None, base: str, adapter: str | None) -> "ImageEncoder":
    """The image encoder that a name means, else that of the adapter, else of the base. Raises as
    :func:`embed`."""
    from imprompt.encoders.clip import ImageEncoder
    from imprompt.generation.families import find_adapter, find_base, load_adapter

    if encoder is not None:
        return ImageEncoder.from_pretrained(encoder)
    found = find_base(base)
    return _beside(load_adapter(find_adapter(adapter, found)), found)


def _beside(loaded: "IPAdapter", base: "Base") -> "ImageEncoder":
    """The adapter's own image encoder, or the one that comes with its base."""
    from imprompt.encoders.clip import ImageEncoder

    if isinstance(loaded.image_encoder, ImageEncoder):
        return loaded.image_encoder
    if base.path is not None and (base.path / "image_encoder").is_dir():
        tower = ImageEncoder.from_pretrained(base.path, subfolder="image_encoder")
        loaded.image_encoder = tower  # refuses other widths
        return tower
    raise ModelError(
        f"adapter '{loaded.checkpoint.name}' has no image encoder beside it, nor has base '{base.name}'; "
        "name one with --encoder."
    )


def from_ipadpt(source: str | Path, target: str | Path) -> Path:
    """What ComfyUI or diffusers saved of pictures or faces (``.ipadpt``, a pickle; read as data); the path.

    ComfyUI saves a tensor: faces (512 wide), or an encoder's pooled ``(N, E)`` or hidden ``(N, P, W)``
    features. diffusers saves a list of one, with the negative half in front. What is missing of a
    :class:`Features` has width 0. Raises :class:`ModelError` for what is damaged, not finite or none of
    these.
    """
    import torch

    from imprompt.catalog.published import ENCODERS
    from imprompt.checkpoints.files import unpickle
    from imprompt.encoders import face
    from imprompt.encoders.clip import Features
    from imprompt.encoders.features import Saved, save

    content = unpickle(Path(source))
    negative = None
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], torch.Tensor):
        halves = content[0]
        if halves.ndim in (3, 4) and len(halves) in (1, 2):
            content, negative = halves[-1], halves[0, :1] if len(halves) == 2 else None
    found = content.float() if isinstance(content, torch.Tensor) and content.is_floating_point() else None
    if found is None or found.ndim not in (1, 2, 3) or not found.numel():
        what = list(content.shape) if isinstance(content, torch.Tensor) else type(content).__name__
        raise ModelError(
            f"'{source}' holds neither faces nor an image encoder's features ({what}); embed the picture "
            "itself with imprompt embed."
        )
    if not bool(torch.isfinite(found).all()):
        raise ModelError(f"'{source}' contains NaN or infinite values; make it again.")
    width = found.shape[-1]
    if width == 512:
        return face.save(face.Faces(found.reshape(-1, 512), "unknown"), target)
    if found.ndim == 3 and found.shape[1] > 1:
        kind, pooled, hidden = "hidden", found.new_zeros(len(found), 0), found
        zeros = found.new_zeros(1, 0, 0) if negative is None else negative.float()
    else:
        kind, pooled = "pooled", found.reshape(-1, width)
        hidden, zeros = found.new_zeros(len(pooled), 0, 0), found.new_zeros(1, 0, 0)
    name = ENCODERS.get((kind, width), f"of {Path(source).name}")
    return save(Saved(Features(pooled, hidden, zeros), name, "", (), "crop"), target)
