"""Read pictures: a file, bytes or a PIL image to an upright 8-bit sRGB picture.

All pictures are read here. The size in the header is checked before anything is decoded, and pictures are
decoded completely, so that a broken one is found here. Whatever cannot be read as its author saw it raises
:class:`InputError`, which names the file; nothing is repaired silently.
"""

import hashlib
import io
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from imprompt.errors import InputError, first_line
from imprompt.io import check_file, printable

Source: TypeAlias = str | Path | bytes | Image.Image

MAX_PIXELS = 64 * 1024 * 1024
"""Default limit of width × height, by the header: 192 MB decoded to RGB."""

MAX_FRAMES = 512
"""Default limit of frames per clip."""

MAX_BYTES = 1024 * 1024 * 1024
"""Default limit of the decoded size of all pictures and clips of a request, in bytes."""

_MOST_FPS = 60  # of a clip
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of pictures in a folder of frames
# Formats of still pictures, without the ones that run an interpreter (EPS, WMF) or guess from nothing (TGA).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "QOI")
_MOVING = ("GIF", "WEBP", "PNG", "AVIF")  # of those, the ones that can be animated
_MOV_ATOMS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_STILL_BRANDS = (b"avi", b"hei", b"hev", b"mif", b"msf")  # AVIF and HEIF, in the container of MP4
_MATROSKA = b"\x1a\x45\xdf\xa3"
_NAME = "imprompt name"  # key of a picture's info
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


class Budget:
    """Number of bytes that may still be decoded, shared by all pictures and clips of a request."""

    def __init__(self, limit: int = MAX_BYTES) -> None:
        self.limit, self.left = limit, limit

    def take(self, size: int, name: str) -> None:
        """Take ``size`` bytes for the file ``name``. Raises :class:`InputError` if they exceed what is
        left."""
        self.left -= size
        if self.left < 0:
            raise InputError(
                f"{name} needs {size / 1e6:,.0f} MB once decoded; all pictures and clips together may take "
                f"{self.limit / 1e6:,.0f} MB. Scale it down or cut it first."
            )


def load_image(
    source: Source,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = (255, 255, 255),
    budget: Budget | None = None,
) -> Image.Image:
    """Read a picture as upright 8-bit sRGB.

    Applies the EXIF orientation, converts an embedded colour profile to sRGB, and composites transparency on
    ``background``. 16-bit values are scaled by 1/257. Grey floats are 0 to 1, or, if larger values occur, 0
    to 255 or 0 to 65535. Of an animation, the first frame is read. Raises :class:`InputError` for a file that
    is missing, unreadable, no picture, truncated, larger than ``max_pixels`` or ``budget``, or has NaN or
    values of an unknown range.
    """
    with _opened(source, max_pixels) as (image, name):
        _load(image, name, budget)
        return _flattened(_srgb(_eight_bit(_upright(image), name)), background)


def with_name(image: Image.Image, source: object) -> Image.Image:
    """The same picture, which messages call by its path or name from now on; see :func:`name_of`."""
    if isinstance(source, str | Path):
        image.info[_NAME] = str(source)
    return image


def name_of(picture: object) -> str:
    """What messages call a picture: its path, or what :func:`with_name` gave it."""
    return str(
        picture if isinstance(picture, str) else getattr(picture, "info", {}).get(_NAME, "the given picture")
    )


def with_numbers(frames: Sequence[Image.Image], source: object) -> Sequence[Image.Image]:
    """The same frames, each of which messages call by the clip's name and its number, from 0.

    A frame that stands in several places keeps its first number."""
    clip, named = str(source) if isinstance(source, Path) else name_of(source), set[int]()
    for number, frame in enumerate(frames):
        if id(frame) not in named:
            with_name(frame, f"{clip}, frame {number}")
            named.add(id(frame))
    return frames


def as_bytes(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """A picture as an encoded file; ``options`` are Pillow's for the format."""
    memory = io.BytesIO()
    image.save(memory, form, **options)
    return memory.getvalue()


def load_mask(source: Source, *, budget: Budget | None = None, notes: list[str] | None = None) -> Image.Image:
    """Read a mask as upright 8-bit grey: white is inside, black and transparent are outside.

    Like :func:`load_image`, but colour profiles are ignored, since a mask's values are weights and not
    colours. If no value is above 1 of 255, as in masks of many segmentation tools, 1 counts as white, and a
    line that says so is added to ``notes``.
    """
    with _opened(source, MAX_PIXELS) as (image, name):
        _load(image, name, budget)
        image = _upright(image)
        if image.mode.startswith("I") and image.getextrema() == (0, 1):
            image = Image.fromarray(np.asarray(image).astype(np.uint8))
        mask = _flattened(_eight_bit(image, name), (0, 0, 0)).convert("L")
        if mask.getextrema()[1] != 1:
            return mask
        if notes is not None:
            notes.append(f"mask {name} holds only the values 0 and 1; 1 is read as white")
        return mask.point(lambda value: 255 * value)


def load_frames(source: Source, *, budget: Budget | None = None) -> tuple[list[Image.Image], float | None]:
    """Read all frames of an animated picture (GIF, WebP, PNG, AVIF), and the frames per second; of a folder,
    its pictures in the order of their names, and ``None``.

    Where an animation shows some frames longer than others, they are repeated, so that all have one length;
    equal frames that a writer merged come back as they were. A still has one frame. Raises
    :class:`InputError` as :func:`load_image`, for more than :data:`MAX_FRAMES` frames, and for frames of
    different sizes.
    """
    budget = budget or Budget()
    if isinstance(source, str | Path) and (place := check_file(source, folder=True)).is_dir():
        return _folder_frames(place, budget), None
    frames, ends = [], [0.0]
    with _opened(source, MAX_PIXELS) as (image, name):
        count = int(getattr(image, "n_frames", 1))
        if count > MAX_FRAMES:
            raise InputError(f"{name} has {count} frames; at most {MAX_FRAMES} are read.")
        budget.take(3 * image.width * image.height * count, name)
        for number in range(count):
            if count > 1:
                image.seek(number)
            image.load()  # WebP knows a frame's duration only then
            if count > 1:
                ends.append(ends[-1] + float(image.info.get("duration") or 100))
            frames.append(_flattened(_srgb(_eight_bit(_upright(image), name)), (255, 255, 255)))
        unit = 10.0 if image.format == "GIF" else 1.0
    if count == 1:
        return frames, None
    shown = _evenly(ends[1:], unit)
    return [frames[place] for place in shown], 1000 * len(shown) / ends[-1]


def _evenly(ends: Sequence[float], unit: float) -> list[int]:
    """The frame that is shown in each of the fewest equal parts of an animation whose borders hold all
    ``ends`` of frames, in ms, as exactly as multiples of ``unit`` can tell; at most 60 parts a second."""
    count, last = len(ends), ends[-1]
    durations = [after - before for before, after in pairwise((0.0, *ends))]
    if max(durations) - min(durations) <= unit:
        return list(range(count))
    most = max(count, min(MAX_FRAMES, int(last * _MOST_FPS / 1000)))
    parts = next((parts for parts in range(count, most + 1) if _fits(ends, last / parts, unit)), most)
    return [min(bisect_right(ends, (number + 0.5) * last / parts), count - 1) for number in range(parts)]


def _fits(ends: Sequence[float], part: float, unit: float) -> bool:
    """Whether each end lies at a border of its own between equal parts."""
    borders = [round(end / part) for end in ends]
    near = min(unit, part / 3)
    return len({0, *borders}) == len(ends) + 1 and all(
        abs(end - border * part) <= near for end, border in zip(ends, borders, strict=True)
    )


def _folder_frames(folder: Path, budget: Budget) -> list[Image.Image]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise InputError(f"folder '{folder}' holds no pictures ({', '.join(_SUFFIXES)}).")
    if len(paths) > MAX_FRAMES:
        raise InputError(f"'{folder}' has {len(paths)} frames; at most {MAX_FRAMES} are read.")
    frames = [load_image(path, budget=budget) for path in paths]
    if len({frame.size for frame in frames}) > 1:
        raise InputError(f"the pictures in '{folder}' have different sizes; frames of a clip have one.")
    return frames


def frame_count(source: Source) -> int:
    """Number of frames of a picture; 1 for stills, and for files that :func:`load_image` refuses."""
    if isinstance(source, Image.Image):
        return int(getattr(source, "n_frames", 1))
    try:
        stream = io.BytesIO(source) if isinstance(source, bytes) else check_file(source)
        with warnings.catch_warnings(action="ignore"), Image.open(stream, formats=_MOVING) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # of another format, or damaged: reported where it is decoded
        return 1


def container_of(start: bytes) -> str | None:
    """FFmpeg's name of the video container that begins with these bytes (12 suffice); ``None`` for others."""
    if start[4:8] in _MOV_ATOMS and start[8:11] not in _STILL_BRANDS:
        return "mov"
    return "matroska" if start.startswith(_MATROSKA) else None


def content_hash(image: Image.Image) -> str:
    """SHA-256 of a picture's mode, size and pixels."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


@contextmanager
def _opened(source: Source, max_pixels: int) -> Iterator[tuple[Image.Image, str]]:
    """Open a picture and check its header; yields it with its name for messages. Any error inside is raised
    as :class:`InputError`."""
    stream, name = _stream(source)
    try:
        with warnings.catch_warnings():
            # Pillow warns of damage and of size, which an error says if it matters. What is larger than its
            # header said (a picture inside ICO) is an error as well.
            warnings.simplefilter("ignore")
            image = source if isinstance(source, Image.Image) else _sniffed(stream, name)
            if image.width * image.height > max_pixels:
                raise InputError(_too_large(name, f"{image.width}×{image.height} pixels", max_pixels))
            if not image.width or not image.height:
                raise InputError(f"{name} has no pixels ({image.width}×{image.height}).")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield image, name
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name} {_no_picture(stream)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(_too_large(name, "far more pixels", max_pixels)) from error
    except MemoryError as error:
        raise InputError(f"{name} does not fit into memory; scale it down first.") from error
    except Exception as error:
        # Decoders raise nearly anything on damaged data: SyntaxError, struct.error, zlib.error, KeyError, …
        reason = printable(first_line(error))
        raise InputError(f"{name} is truncated or damaged and cannot be decoded ({reason}).") from error
    finally:
        if stream is not None:
            stream.close()


def _stream(source: Source) -> tuple[IO[bytes] | None, str]:
    """The stream to read (``None`` for a PIL image), and the name for messages."""
    if isinstance(source, Image.Image):
        return None, "the given PIL image"
    if isinstance(source, bytes):
        return io.BytesIO(source), f"the given data ({len(source)} bytes)"
    if not isinstance(source, str | Path):
        raise InputError(f"a picture is a path, bytes or a PIL image; got a {type(source).__name__}.")
    name = f"'{printable(str(source))}'"
    try:
        return check_file(source).open("rb"), name
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}).") from error


def _sniffed(stream: IO[bytes] | None, name: str) -> Image.Image:
    if stream is None or not stream.read(1):
        raise InputError(f"{name}: empty, no picture.")
    stream.seek(0)
    return Image.open(stream, formats=_FORMATS)


def _no_picture(stream: IO[bytes] | None) -> str:
    """What is wrong with a file that Pillow does not know."""
    if stream is not None:
        stream.seek(0)
        if container_of(stream.read(12)):
            return (
                "is a video, and a picture is expected; save one of its frames as a picture, or show all of "
                "them in a clip: imprompt animate --image PATH,at=each."
            )
    return f"is not a picture that can be read here (known: {', '.join(_FORMATS)}); save it as PNG or JPEG."


def _load(image: Image.Image, name: str, budget: Budget | None) -> None:
    """Decode the first frame."""
    width = 16 if image.mode.startswith(("I", "F")) else 3  # numbers are scaled as floats of 8 bytes
    (budget or Budget()).take(width * image.width * image.height, name)
    image.load()


def _too_large(name: str, given: str, cap: int) -> str:
    return f"{name} has {given}; at most {cap / 1e6:.0f} million are read. Scale it down first."


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF beside sound pixels states no orientation
        return image


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """Convert 16-bit, 32-bit or float grey to 8 bit. (Pillow's conversion would clip it.)"""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds NaN or infinite values; finite ones are expected.")
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
    if "icc_profile" in image.info:
        grey.info["icc_profile"] = image.info["icc_profile"]
    return grey


def _srgb(image: Image.Image) -> Image.Image:
    """Convert the colours of an embedded profile to sRGB. Without a profile they are taken for sRGB."""
    srgb = ImageCms.createProfile("sRGB")
    if image.mode == "LAB":
        converted = ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), srgb, outputMode="RGB")
        return image if converted is None else converted
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    alpha = None
    if image.mode in _ALPHA or "transparency" in image.info:
        alpha = image.convert("RGBA").getchannel("A")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}[source.profile.xcolor_space]
        if (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and image.mode not in _GREY):
            return image  # a profile of other colours than the picture's
        colours = image.convert(mode)
        colours.info.pop("transparency", None)
        converted = ImageCms.profileToProfile(colours, source, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, KeyError):  # a broken profile says nothing about the colours
        return image
    if converted is None:
        return image
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


_GREY = ("1", "L", "LA", "La")


def _flattened(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Convert to RGB without transparency and metadata."""
    if image.mode in _ALPHA or "transparency" in image.info:
        layered = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*background, 255))
        ground.alpha_composite(layered)
        image = ground
    flat = image.convert("RGB")
    if flat is image:
        flat = image.copy()
    flat.info = {}
    return flat
