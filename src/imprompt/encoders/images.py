"""The one door for pixels: a file, bytes or PIL image goes in, an upright 8-bit sRGB picture comes out.

Size is checked from the header before anything is decoded, and everything is decoded before it is returned,
so that no broken picture gets further than here. Nothing is repaired silently: what cannot be read as the
picture its author saw is an :class:`InputError` that names the file.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from imprompt.errors import InputError, first_line

Source: TypeAlias = str | Path | bytes | Image.Image

MAX_PIXELS = 64 * 1024 * 1024
"""Default cap on width × height, as stated by the header: 192 MB once decoded to RGB."""

MAX_FRAMES = 512
"""Default cap on the frames of a clip."""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of pictures in a folder of frames
# Formats of still pictures, without the ones that run an interpreter (EPS, WMF) or guess from nothing (TGA).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "QOI")
_MOVING = ("GIF", "WEBP", "PNG", "AVIF")  # of those, the ones that can be animated
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    source: Source, *, max_pixels: int = MAX_PIXELS, background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """A picture as upright 8-bit sRGB.

    EXIF orientation is applied; an embedded colour profile is converted to sRGB; transparency is composited
    on ``background``, so that colours hidden under it do not show; 16-bit values are scaled by 1/257. Grey
    floats are 0 to 1, or, when larger values occur, 0 to 255 or 0 to 65535. Of an animation the first frame
    is taken. Raises :class:`InputError` for what is missing, unreadable, no picture, truncated, larger than
    ``max_pixels``, or holds NaN or values of no known range.
    """
    with _opened(source, max_pixels) as (image, name):
        return _flattened(_srgb(_eight_bit(_upright(image), name)), background)


def load_mask(source: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A mask as upright 8-bit grey: white is inside, black and transparent are outside.

    The same door as :func:`load_image`, except that a colour profile is left alone: a mask's values are
    weights, not colours.
    """
    with _opened(source, max_pixels) as (image, name):
        return _flattened(_eight_bit(_upright(image), name), (0, 0, 0)).convert("L")


def load_frames(
    source: Source, *, max_frames: int = MAX_FRAMES, max_pixels: int = MAX_PIXELS
) -> tuple[list[Image.Image], float | None]:
    """All frames of an animated picture (GIF, WebP, PNG, AVIF) as :func:`load_image` gives one, and how many
    there are a second; of a folder, its pictures in the order of their names, and no pace. A still is one
    frame. Raises :class:`InputError` as :func:`load_image`, for more than ``max_frames`` frames, and for
    frames of different sizes."""
    if isinstance(source, str | Path) and Path(source).is_dir():
        places = sorted(path for path in Path(source).iterdir() if path.suffix.lower() in _SUFFIXES)
        if not places:
            raise InputError(f"folder '{source}' holds no pictures ({', '.join(_SUFFIXES)}).")
        if len(places) > max_frames:
            raise InputError(f"'{source}' has {len(places)} frames; at most {max_frames} are read.")
        frames = [load_image(place, max_pixels=max_pixels) for place in places]
        if len({frame.size for frame in frames}) > 1:
            raise InputError(f"the pictures in '{source}' have different sizes; frames of a clip have one.")
        return frames, None
    frames, milliseconds = [], 0.0
    with _opened(source, max_pixels) as (image, name):
        count = int(getattr(image, "n_frames", 1))
        if count > max_frames:
            raise InputError(f"{name} has {count} frames; at most {max_frames} are read.")
        for number in range(count):
            if count > 1:
                image.seek(number)
                image.load()
                milliseconds += float(image.info.get("duration") or 100)
            frames.append(_flattened(_srgb(_eight_bit(_upright(image), name)), (255, 255, 255)))
    return frames, 1000 * count / milliseconds if milliseconds else None


def frame_count(source: Source) -> int:
    """How many frames a picture has, 1 for a still and for what :func:`load_image` would refuse."""
    if isinstance(source, Image.Image):
        return int(getattr(source, "n_frames", 1))
    try:
        with Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=_MOVING
        ) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # not of these formats, or damaged: said where it is decoded
        return 1


def content_hash(image: Image.Image) -> str:
    """sha256 of a picture's mode, size and pixels: equal exactly for equal pictures."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


@contextmanager
def _opened(source: Source, max_pixels: int) -> Iterator[tuple[Image.Image, str]]:
    """The decoded picture and its name for messages; any failure inside becomes an :class:`InputError`."""
    stream: IO[bytes] | None = None
    if isinstance(source, Image.Image):
        name = "the given PIL image"
    elif isinstance(source, bytes):
        name, stream = f"the given data ({len(source)} bytes)", io.BytesIO(source)
    elif isinstance(source, str | Path):
        name, stream = f"'{source}'", _stream(Path(source))
    else:
        raise InputError(f"a picture is a path, bytes or a PIL image; got a {type(source).__name__}.")
    try:
        image = source if isinstance(source, Image.Image) else _sniffed(stream, name)
        if image.width * image.height > max_pixels:
            raise InputError(_too_large(name, f"{image.width}×{image.height} pixels", max_pixels))
        if not image.width or not image.height:
            raise InputError(f"{name} has no pixels ({image.width}×{image.height}).")
        image.load()
        yield image, name
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} is no picture that can be read here (known: {', '.join(_FORMATS)})."
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(_too_large(name, "far more pixels", max_pixels)) from error
    except MemoryError as error:
        raise InputError(f"{name} does not fit into memory; scale it down first.") from error
    except Exception as error:
        # Decoders raise nearly anything on damaged data: SyntaxError, struct.error, zlib.error, KeyError, …
        reason = first_line(error)
        raise InputError(f"{name} is truncated or damaged and cannot be decoded ({reason}).") from error
    finally:
        if stream is not None:
            stream.close()


def _stream(path: Path) -> IO[bytes]:
    if not path.exists():
        raise InputError(f"there is no file '{path}'.")
    if not path.is_file():
        raise InputError(f"'{path}' is no file; give a picture's path.")
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}).") from error


def _sniffed(stream: IO[bytes] | None, name: str) -> Image.Image:
    if stream is None or not stream.read(1):
        raise InputError(f"{name}: empty, no picture.")
    stream.seek(0)
    with warnings.catch_warnings():
        # Pillow warns of what the cap refuses, and of formats it tried; both are said by the error.
        warnings.simplefilter("ignore")
        return Image.open(stream, formats=_FORMATS)


def _too_large(name: str, given: str, cap: int) -> str:
    return f"{name} has {given}; at most {cap / 1e6:.0f} million are read. Scale it down first."


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF beside sound pixels states no orientation
        return image
    method = _UPRIGHT.get(orientation)
    if method is None:
        return image
    turned = image.transpose(method)
    turned.info = {key: value for key, value in image.info.items() if key in ("transparency", "icc_profile")}
    return turned


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 bit, 32 bit or floats as 8 bit; Pillow's own conversion clips it to white or black."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds NaN or infinite values.")
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        top = next((top for top in (1.0, 255.0, 65535.0) if high <= top), None)
    else:  # 16-bit files arrive as I;16, or as I where the format has only that
        top = 65535.0 if high <= 65535 else None
    if low < 0 or top is None:
        raise InputError(
            f"{name} holds values from {low:g} to {high:g}; expected are 0 to 1 (floats) or 0 to 65535. "
            "Save it with 8 or 16 bits."
        )
    grey = Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    hidden = image.info.get("transparency")  # a 16-bit PNG may name one value as transparent
    if isinstance(hidden, int):
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


def _srgb(image: Image.Image) -> Image.Image:
    """Colours of an embedded profile as sRGB; without one they are sRGB (CMYK: by the plain formula)."""
    alpha = None
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        return image if converted is None else converted
    if profile and image.mode in ("RGB", "RGBA", "CMYK", "P"):
        colours = image if image.mode == "CMYK" else image.convert("RGB")
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(
                colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, OSError):  # a broken profile says nothing about the colours
            converted = None
        if converted is not None:
            if alpha is not None:
                converted.putalpha(alpha)
            return converted
    return image


def _flattened(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """RGB without transparency and without metadata."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layered = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*background, 255))
        ground.alpha_composite(layered)
        image = ground
    flat = image.convert("RGB")
    if flat is image:
        flat = image.copy()
    flat.info = {}
    return flat
