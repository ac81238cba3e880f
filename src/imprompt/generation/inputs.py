"""Read the pictures of a request. Each file is opened once.

In: a request with its defaults filled in, and pictures handed over by name. Out: its prompts with pictures in
place of names, the pictures to start from at the drawn size, and notes for the user.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from imprompt.encoders.images import Budget, frame_count, load_image, load_mask, with_name, with_numbers
from imprompt.encoders.video import is_clip, read_clip
from imprompt.errors import InputError, UsageError
from imprompt.generation import video
from imprompt.generation.annotate import annotate_frames
from imprompt.generation.control import Map
from imprompt.io import check_path, sha256
from imprompt.output import recorded_fps
from imprompt.schema.prompt import ImagePrompt, TextRegion
from imprompt.schema.request import MAX_SIDE, Request
from imprompt.schema.values import is_saved

_LOST = 0.15  # share of a picture that may be cropped away without a note
_ASPECT = 0.02  # how far proportions may differ and count as the same


@dataclass(frozen=True)
class Inputs:
    """The pictures, masks and maps that a request is drawn from."""

    request: Request
    """With the size, of a clip its frames and rate, and the hashes of the files that were read."""
    prompts: tuple[ImagePrompt, ...]
    """The image prompts with pictures in place of names, each with its scale and the name of its adapter."""
    regions: tuple[TextRegion, ...]
    start: Image.Image | None
    """The picture to start from, at the drawn size."""
    region: Image.Image | None
    """The mask of the task inpaint (white is redrawn), at the drawn size."""
    frames: tuple[Image.Image, ...] | None
    """The frames to start from, at the drawn size."""
    maps: tuple[Map, ...]
    """The map of each control at the drawn size; for a control that moves, one for each frame."""
    notes: tuple[str, ...]


def read_inputs(request: Request, pictures: Mapping[str, Any], side: int, multiple: int = 8) -> Inputs:
    """Read everything that ``request`` names; names are looked up in ``pictures`` first.

    ``side`` is that of the square the base is drawn at by default, ``multiple`` what its width and height are
    multiples of. Raises :class:`InputError` for files that are missing, changed, unreadable or do not go
    together, and :class:`UsageError` for sizes the base cannot draw and frames that a clip does not have.
    """
    files = _Files(request, pictures)
    request, start, frames = _source(files, request.replace(hashes=files.hashes))
    size = _size(request, start, side, multiple)
    request = request.replace(size=size)
    region = _inpainted(files, request, start)
    controls = [_control(files, control.path, request, frames) for control in request.controls]
    aligned = [image for image in (start, *(shown[0] for shown in controls)) if image is not None]
    place = _Placing(files, request, aligned)
    prompts = tuple(place.prompt(prompt) for prompt in request.images)
    regions = tuple(each.replace(mask=place.mask(each.mask)) for each in request.regions)
    return Inputs(
        request=request,
        prompts=prompts,
        regions=regions,
        start=None if frames or start is None else fitted(start, size),
        region=None if region is None else fitted(region, size),
        frames=None if frames is None else tuple(fitted(frame, size) for frame in frames),
        maps=_maps(request, controls, size),
        notes=(*_size_notes(request, start, controls, region), *files.notes),
    )


def _source(
    files: "_Files", request: Request
) -> tuple[Request, Image.Image | None, list[Image.Image] | None]:
    """The picture to start from, or the first frame and all frames of the video, at the request's rate."""
    if request.video is None:
        return request, None if request.image is None else files.picture(request.image), None
    shown, fps = files.clip(request.video)
    if fps is None and isinstance(source := files.source(request.video), Path):
        fps = recorded_fps(source)
    frames, fps = video.at_rate(shown, fps, request)
    return request.replace(frames=len(frames), fps=fps), frames[0], frames


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Crop around the centre to the proportions of ``size`` and resample, unless it has that size."""
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def crop_notes(inputs: Inputs, whole: Collection[str]) -> list[str]:
    """A note for each picture of which an image encoder sees the centre alone; ``whole`` are the adapters
    that read all of a picture."""
    notes = list[str]()
    for named, shown in zip(inputs.request.images, inputs.prompts, strict=True):
        if named.at == "each" or str(shown.adapter) in whole:
            continue
        for name, picture in zip(named.pictures, shown.pictures, strict=True):
            if isinstance(picture, Image.Image) and (said := _crop_note(picture, named.framing)):
                notes.append(f"'{name}': {said}")
    return list(dict.fromkeys(notes))


def _crop_note(picture: Image.Image, framing: str) -> str:
    """What is lost of a picture in this framing without a word; empty if nothing is."""
    wide = picture.width > picture.height
    idle = ("top", "bottom") if wide else ("left", "right")
    if framing in idle and picture.width != picture.height:
        shape = "wider than high" if wide else "higher than wide"
        return f"framing={framing} has no effect, for it is {shape}: its centre is seen"
    lost = 1 - min(picture.size) / max(picture.size)
    if framing != "crop" or lost <= _LOST:
        return ""
    return (
        f"{lost:.0%} lies outside the centre square that is seen; framing=pad, squash or tile shows all of it"
    )


# ---- files


class _Files:
    """The files of one request, each opened once."""

    def __init__(self, request: Request, given: Mapping[str, Any]) -> None:
        self._request, self._given, self._budget = request, given, Budget()
        self._moving = {request.video, *(prompt.image for prompt in request.images if prompt.at == "each")}
        if request.task == "animate":
            still = (control.path for control in request.controls if control.at is None)
            self._moving |= {*request.masks, *still}
        self.hashes = {name: self._checked(name) for name in request.files if name not in given}
        self.notes = [
            f"'{name}' is animated; its first frame is taken"
            for name in request.files
            if name not in self._moving and frame_count(self.source(name)) > 1
        ]
        self.picture = cache(self._picture)
        self.clip = cache(self._clip)
        self.mask = cache(self._mask)

    def source(self, name: str) -> Any:
        """The picture that was handed over under this name, or the file's path."""
        return self._given[name] if name in self._given else check_path(name)

    def saved(self, name: str) -> bool:
        """Whether it is a file of features."""
        return name not in self._given and is_saved(name)

    def moves(self, name: str) -> bool:
        """Whether frames are read from it, and it has several."""
        return name in self._moving and is_clip(self.source(name))

    def _checked(self, name: str) -> str:
        """The file's SHA-256. Raises when it is not there, or not the one the request was made with."""
        where = _field(self._request, name)
        path = check_path(name, where)
        if not path.is_file() and not (name in self._moving and path.is_dir()):
            folder = path.is_dir()
            wrong = f"'{name}' is a folder; a picture is expected" if folder else f"there is no file '{name}'"
            raise InputError(f"{where}: {wrong}.")
        found = sha256(path)
        if self._request.hashes.get(name, found) != found:
            raise InputError(
                f"'{name}' is not the picture that the request was made with (its sha256 differs); give the "
                "right one, or drop the recorded hashes."
            )
        return found

    def _picture(self, name: str) -> Image.Image:
        return with_name(load_image(self.source(name), budget=self._budget), name)

    def _clip(self, name: str) -> tuple[list[Image.Image], float | None]:
        return read_clip(self.source(name), name, self._budget)

    def _mask(self, name: str) -> Image.Image | tuple[Image.Image, ...]:
        if self._request.task == "animate" and self.moves(name):
            notes: list[str] = []
            masks = [load_mask(frame, notes=notes) for frame in self.clip(name)[0]]
            if notes:
                self.notes.append(f"mask '{name}' holds only the values 0 and 1; 1 is read as white")
        else:
            masks = [load_mask(self.source(name), budget=self._budget, notes=self.notes)]
        if not any(mask.getbbox() for mask in masks):
            raise InputError(
                f"{_field(self._request, name)}: '{name}' is black everywhere and would act nowhere; make it "
                "white where it should act."
            )
        return masks[0] if len(masks) == 1 else tuple(masks)


def _field(request: Request, name: str) -> str:
    """The field of the request that names a file, such as ``images.0.mask``."""

    def places(value: object, here: str) -> Iterator[str]:
        if isinstance(value, dict | list | tuple):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in pairs:
                yield from places(inner, f"{here}.{key}" if here else f"{key}")
        elif value == name:
            yield here

    return next(places(request.model_dump(), ""), "pictures")


# ---- geometry


def _alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have the same proportions."""
    return abs(one[0] * other[1] / (one[1] * other[0]) - 1) <= _ASPECT


def _size(request: Request, start: Image.Image | None, side: int, multiple: int) -> tuple[int, int]:
    """Width and height to draw: as asked for, else the start's proportions at the base's area."""
    if request.size is not None:
        if any(length % multiple for length in request.size):
            raise UsageError(
                f"size: width and height are multiples of {multiple} with this base, not "
                f"{request.size[0]}×{request.size[1]}."
            )
        return request.size
    if start is None:
        return side, side
    stretch = (side * side / (start.width * start.height)) ** 0.5
    width, height = (max(multiple, round(x * stretch / multiple) * multiple) for x in start.size)
    if max(width, height) > MAX_SIDE:
        raise UsageError(
            f"size: a picture of {start.width}×{start.height} would be drawn at {width}×{height}, and sides "
            f"have at most {MAX_SIDE} pixels; say a size, to which it is cropped (--size)."
        )
    return width, height


def _size_notes(
    request: Request,
    start: Image.Image | None,
    controls: list[list[Image.Image]],
    region: Image.Image | None,
) -> Iterator[str]:
    assert request.size is not None
    width, height = request.size
    if start is not None and start.size != request.size:
        name = request.image or request.video
        yield f"'{name}' is {start.width}×{start.height}, drawn at {width}×{height}"
    for control, (image, *_) in zip(request.controls, controls, strict=True):
        if not _alike(image.size, request.size):
            yield (
                f"control '{control.path}' is {image.width}×{image.height}: cropped around the centre to the "
                f"proportions of {width}×{height}"
            )
    if region is not None and region.getextrema()[0] == 255:
        yield f"mask '{request.mask}' is white everywhere: all is drawn anew"


def _inpainted(files: _Files, request: Request, start: Image.Image | None) -> Image.Image | None:
    """The mask of the task inpaint, at its own size. Raises :class:`InputError` for other proportions."""
    if request.mask is None or start is None:
        return None
    mask = files.mask(request.mask)
    assert isinstance(mask, Image.Image)
    if not _alike(mask.size, start.size):
        raise InputError(
            f"mask '{request.mask}' is {mask.width}×{mask.height}, picture '{request.image}' "
            f"{start.width}×{start.height}: they must have the same proportions."
        )
    return mask


@dataclass
class _Placing:
    """Puts pictures and masks into the prompts."""

    files: _Files
    request: Request
    aligned: list[Image.Image]
    """Pictures that are cropped around the centre to the drawn proportions: the start, and controls."""

    def mask(self, name: str) -> Image.Image | tuple[Image.Image, ...]:
        """A mask of a prompt or region: cropped as the picture of its proportions is, else to be stretched
        over the drawing. Raises :class:`InputError` when its frames are not those of the clip."""
        found = self.files.mask(name)
        if isinstance(found, Image.Image):
            return self._cropped(found)
        self._check_count(name, len(found), "masks")
        return tuple(map(self._cropped, found))

    def _cropped(self, mask: Image.Image) -> Image.Image:
        size = self.request.size
        assert size is not None
        if _alike(mask.size, size) or not any(_alike(mask.size, other.size) for other in self.aligned):
            return mask
        scale = max(size[0] / mask.width, size[1] / mask.height)
        kept = max(1, round(size[0] / scale)), max(1, round(size[1] / scale))
        return ImageOps.fit(mask, kept, Image.Resampling.BILINEAR)

    def prompt(self, prompt: ImagePrompt) -> ImagePrompt:
        """The prompt with its pictures, mask, scale and adapter's name."""
        changes: dict[str, object] = {"adapter": prompt.adapter or self.request.adapter}
        if prompt.scale is None:
            changes["scale"] = self.request.scale
        if prompt.mask is not None:
            changes["mask"] = self.mask(prompt.mask)
        if prompt.negative is not None:
            changes["negative"] = self._shown(prompt.negative)
        if prompt.at == "each":
            frames = with_numbers(self.files.clip(prompt.image)[0], prompt.image)
            self._check_count(prompt.image, len(frames), "pictures")
            return prompt.replace(image=frames, at=range(len(frames)), **changes)
        return prompt.replace(image=[self._shown(name) for name in prompt.pictures], **changes)

    def _shown(self, name: str) -> Image.Image | str:
        return name if self.files.saved(name) else self.files.picture(name)

    def _check_count(self, name: str, count: int, what: str) -> None:
        """Raises :class:`InputError` unless there is one for each frame."""
        if count != self.request.frames:
            raise InputError(_uneven(name, count, what, self.request))


# ---- controls


def _control(files: _Files, name: str, request: Request, clip: list[Image.Image] | None) -> list[Image.Image]:
    """A control's picture, or its frames. Raises :class:`InputError` when they are not those of the clip."""
    if clip is not None and name == request.video:
        return list(clip)  # followed where it is redrawn
    frames = files.clip(name)[0] if files.moves(name) else [files.picture(name)]
    if request.task == "animate" and len(frames) not in (1, request.frames):
        raise InputError(_uneven(name, len(frames), "control pictures", request))
    return frames


def _maps(request: Request, controls: list[list[Image.Image]], size: tuple[int, int]) -> tuple[Map, ...]:
    """The map of each control, made from its picture or from each of its frames."""
    maps: list[Map] = []
    for control, pictures in zip(request.controls, controls, strict=True):
        shown = [fitted(picture, size) for picture in pictures]
        found = tuple(annotate_frames(control.kind, shown, face_model=request.face_model))
        maps.append(found[0] if len(found) == 1 else found)
    return tuple(maps)


def _uneven(name: str, count: int, what: str, request: Request) -> str:
    return (
        f"'{name}' holds {count} {what}, the clip has {request.frames} frames; give one for each frame, or "
        f"--frames {count}."
    )
