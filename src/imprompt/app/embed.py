"""``imprompt embed``: pictures in, a file of their features out, for use wherever a picture is."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imprompt.errors import ModelError, UsageError

if TYPE_CHECKING:
    from imprompt.encoders.clip import ImageEncoder


def embed(
    pictures: Sequence[str | Path],
    output: str | Path,
    *,
    encoder: str | None = None,
    base: str = "emoji",
    adapter: str | None = None,
    framing: str = "crop",
    sharpen: float = 0.0,
) -> Path:
    """Encode ``pictures`` and write their features; returns the file's path.

    The encoder is ``encoder`` (a folder, or ``repo:folder``), else the one of ``adapter``, else that of the
    base's default adapter. Raises :class:`UsageError`, :class:`InputError` and :class:`ModelError`; the file
    appears whole or not at all.
    """
    from imprompt import words
    from imprompt.encoders.features import Saved, fingerprint, save
    from imprompt.encoders.framing import encode
    from imprompt.encoders.images import content_hash, load_image

    framing = words.canonical("framing", framing, words.FRAMINGS)
    if Path(output).suffix.lower() != ".safetensors":
        raise UsageError(f"--output '{output}': features are written as .safetensors.")
    decoded = [load_image(picture) for picture in pictures]
    if encoder is not None and adapter is not None:
        raise UsageError("--encoder and --adapter both say which encoder to use; give one.")
    tower = encoder_of(encoder, base, adapter)
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
    loaded = load_adapter(find_adapter(adapter, found))
    if isinstance(loaded.image_encoder, ImageEncoder):
        return loaded.image_encoder
    if found.path is not None and (found.path / "image_encoder").is_dir():
        tower = ImageEncoder.from_pretrained(found.path, subfolder="image_encoder")
        loaded.image_encoder = tower  # refuses other widths
        return tower
    raise ModelError(
        f"adapter '{loaded.checkpoint.name}' has no image encoder beside it, nor has base '{base}'; name one "
        "with --encoder."
    )
