"""Encode pictures and save their features to a file, which can be used wherever a picture is expected."""

from collections.abc import Sequence
from pathlib import Path

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders import face as faces
from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.features import Saved, check_target, fingerprint, save
from imprompt.encoders.framing import encode
from imprompt.encoders.images import content_hash, load_image, with_name
from imprompt.errors import ModelError, UsageError
from imprompt.generation.families import Base, find_adapter, find_base
from imprompt.schema import options


def embed(
    pictures: Sequence[str | Path],
    output: str | Path,
    *,
    encoder: str | None = None,
    base: str | None = None,
    adapter: str | None = None,
    framing: str = "crop",
    sharpen: float = 0.0,
    face_model: str | None = None,
    face: str = "largest",
    overwrite: bool = False,
) -> Path:
    """Encode ``pictures``, write their features, or their faces for a face adapter, and return the path.

    The image encoder is ``encoder`` (a folder, or ``repository:folder``), else that of ``adapter``, else
    that of the default adapter of ``base`` (default: emoji). The file is written whole or not at all; one
    that holds no saved features is replaced only with ``overwrite``. Raises :class:`UsageError` for options
    that exclude each other, :class:`InputError` for pictures and files that cannot be read or written, and
    :class:`ModelError` for models that cannot be read.
    """
    framing = options.canonical("framing", framing, options.FRAMINGS)
    if Path(output).suffix.lower() != ".safetensors":
        raise UsageError(f"--output '{output}': features are written as .safetensors.")
    _check_one_encoder(encoder, adapter, base)
    if isinstance(pictures, str | Path):
        raise UsageError(f"embed: a list of pictures is expected; write ['{pictures}'].")
    check_target(output, overwrite=overwrite, reads=[*pictures, encoder, adapter, base])
    decoded = [with_name(load_image(picture), picture) for picture in pictures]
    hashes = tuple(content_hash(picture) for picture in decoded)
    if encoder is None:
        found = find_base(base or "emoji")
        loaded = IPAdapter.from_pretrained(find_adapter(adapter, found))
        if loaded.projection.variant.reads_faces:
            _prepare_faces(loaded, found, face_model)
            encoded = loaded.encode(decoded, framing, sharpen=sharpen, face=face)
            assert isinstance(encoded, faces.Faces)
            return faces.save(encoded, output, hashes, overwrite=overwrite)
        model = _encoder_for(loaded, found)
    else:
        model = ImageEncoder.from_pretrained(encoder)
    if face_model is not None or face != "largest":
        raise UsageError(
            "--face-model and --face have no effect without a face adapter; name one (--adapter)."
        )
    features = encode(model, decoded, framing, sharpen=sharpen)
    saved = Saved(features, model.name, fingerprint(model.model), hashes, framing)
    return save(saved, output, overwrite=overwrite)


def encoder_of(base: str, adapter: str | None) -> ImageEncoder:
    """The image encoder of an adapter, by default of the base's default adapter; for one that reads face
    embeddings alone the base's own, or its default adapter's. Raises as :func:`embed`."""
    found = find_base(base)
    loaded = IPAdapter.from_pretrained(find_adapter(adapter, found))
    if loaded.projection.feature != "face":
        return _encoder_for(loaded, found)
    return _own_encoder(found) or _encoder_for(IPAdapter.from_pretrained(find_adapter(None, found)), found)


def _check_one_encoder(encoder: str | None, adapter: str | None, base: str | None) -> None:
    for flag, name in (("adapter", adapter), ("base", base)):
        if encoder is not None and name is not None:
            raise UsageError(f"--encoder and --{flag} both name an encoder; give one.")


def _prepare_faces(loaded: IPAdapter, base: Base, face_model: str | None) -> None:
    """Give a face adapter what reads faces: the face model, and for Plus the image encoder."""
    if face_model is not None:
        loaded.face_embedder = face_model
    if loaded.projection.patch_width is not None:
        _encoder_for(loaded, base)


def _encoder_for(loaded: IPAdapter, base: Base) -> ImageEncoder:
    """The adapter's own image encoder, or the one in the base's folder."""
    if isinstance(loaded.image_encoder, ImageEncoder):
        return loaded.image_encoder
    if (model := _own_encoder(base)) is not None:
        loaded.image_encoder = model  # refuses an encoder of another width
        return model
    raise ModelError(
        f"neither adapter '{loaded.checkpoint.name}' nor base '{base.name}' has an image encoder beside it; "
        "name one with --encoder."
    )


def _own_encoder(base: Base) -> ImageEncoder | None:
    """The image encoder in the base's folder, if there is one."""
    if base.path is None or not (base.path / "image_encoder").is_dir():
        return None
    return ImageEncoder.from_pretrained(base.path, subfolder="image_encoder")
