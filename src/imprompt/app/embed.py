"""``imprompt embed``: pictures in, a file of their features out, for use wherever a picture is."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imprompt.errors import ModelError, UsageError

if TYPE_CHECKING:
    from imprompt.adapter.adapter import IPAdapter
    from imprompt.encoders.clip import ImageEncoder
    from imprompt.generation.models import Base


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
    from imprompt import words
    from imprompt.encoders import face as faces
    from imprompt.encoders.clip import ImageEncoder
    from imprompt.encoders.features import Saved, fingerprint, save
    from imprompt.encoders.framing import encode
    from imprompt.encoders.images import content_hash, load_image
    from imprompt.generation.models import find_adapter, find_base, load_adapter

    framing = words.canonical("framing", framing, words.FRAMINGS)
    if Path(output).suffix.lower() != ".safetensors":
        raise UsageError(f"--output '{output}': features are written as .safetensors.")
    decoded = [load_image(picture) for picture in pictures]
    if encoder is not None and adapter is not None:
        raise UsageError("--encoder and --adapter both say which encoder to use; give one.")
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
    from imprompt.generation.models import find_adapter, find_base, load_adapter

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
    """Face embeddings that ComfyUI saved (``.ipadpt``, a pickle; read as data) as saved faces; the path.

    The file does not say which face model made them. Raises :class:`ModelError` for what is damaged or no
    face embedding: features of pictures lack parts that are needed here.
    """
    import torch

    from imprompt.adapter.files import unpickle
    from imprompt.encoders.face import Faces, save

    content = unpickle(Path(source))
    if not isinstance(content, torch.Tensor) or content.shape[-1:] != (512,):
        what = list(content.shape) if isinstance(content, torch.Tensor) else type(content).__name__
        raise ModelError(
            f"'{source}' holds no face embeddings of width 512 ({what}); embed the picture itself with "
            "imprompt embed, or give the tensor in Python as features=."
        )
    return save(Faces(content.reshape(-1, 512).float(), "unknown"), target)
