"""Still pictures as bytes, with the record inside, and the record out of a still.

PNG has the record in the text chunk ``imprompt`` and the format of other tools in ``parameters``; JPEG and
WebP have both in EXIF. Maps of controls and pages of pictures are PNG with a chunk that says so.
"""

from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imprompt.encoders.images import as_bytes
from imprompt.errors import InputError
from imprompt.output.record import KEY

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Suffix of a file's name → Pillow's name of the format."""

_EXIF_DESCRIPTION = 0x010E
_EXIF_IFD = 0x8769
_EXIF_COMMENT = 0x9286
_UNICODE = b"UNICODE\0"


def encode_still(image: Image.Image, suffix: str, record: str, parameters: str) -> bytes:
    """A picture in the format of ``suffix`` with two texts inside; ``record`` must be ASCII.

    PNG and WebP are lossless, JPEG has quality 95 and full colour resolution. Raises :class:`InputError` when
    the format cannot hold the picture or the texts.
    """
    if FORMATS[suffix] == "PNG":
        return encode_png(image, {KEY: record, "parameters": parameters})
    exif = Image.Exif()
    exif[_EXIF_DESCRIPTION] = record
    exif.get_ifd(_EXIF_IFD)[_EXIF_COMMENT] = _UNICODE + parameters.encode("utf-16-be")
    options: dict[str, Any] = {"quality": 95, "subsampling": 0}
    if FORMATS[suffix] == "WEBP":
        options = {"lossless": True}
    try:
        return as_bytes(image, FORMATS[suffix], exif=exif, **options)
    except ValueError as error:
        raise InputError(f"{suffix} cannot hold it ({error}); a .png holds more.") from error


def encode_png(image: Image.Image, texts: dict[str, str]) -> bytes:
    """A picture as PNG with text chunks (UTF-8)."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    return as_bytes(image, pnginfo=info)


def still_text(image: Image.Image) -> str | None:
    """The record in an opened PNG, JPEG or WebP; ``None`` if there is none."""
    text = image.info.get(KEY) if image.format == "PNG" else image.getexif().get(_EXIF_DESCRIPTION)
    return text if isinstance(text, str) and f'"{KEY}":' in text else None


def is_ours(image: Image.Image) -> bool:
    """Whether imprompt made an opened PNG, JPEG or WebP: a picture, a control's map or a page."""
    if image.format == "PNG" and any(isinstance(key, str) and key.startswith(KEY) for key in image.info):
        return True
    return still_text(image) is not None
