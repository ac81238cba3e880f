"""How an image prompt changes over the frames of a video.

A :class:`Track` holds the frame of each picture, a strength curve over the clip, and a mask for each frame.
``CompiledPrompt.over_frames`` turns a prompt with a track into one prompt per frame; the attention then
treats frames as batch rows, like samples.

Dimensions: K key pictures, T tokens of each, C token width, F frames.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.adapter.schedule import curve_at
from imprompt.errors import UsageError
from imprompt.schema.options import Points


@dataclass(frozen=True, eq=False)
class Track:
    """How a prompt changes over frames."""

    at: tuple[int, ...] | None = None
    """The frame of each picture, counted from 0, ascending. Tokens are interpolated linearly between two
    pictures and constant before the first and after the last. ``None``: the same in all frames."""
    curve: Points = ((0.0, 1.0),)
    """Strength factor over the clip: position 0 is the first frame, 1 the last."""
    masks: tuple[Float[Tensor, "1 1 H W"], ...] | None = None
    """One mask per frame."""

    @property
    def static(self) -> bool:
        """Whether all frames get the same prompt."""
        return self.at is None and self.masks is None and all(factor == 1 for _, factor in self.curve)

    def check(self, frames: int) -> None:
        """Raise :class:`UsageError` if the track does not fit a clip of ``frames`` frames."""
        if frames == 1:
            raise UsageError(
                "an image prompt varies over frames, but stills are drawn; attach the adapter to a video "
                "pipeline, or leave out at, frame_curve and masks per frame."
            )
        if self.at is not None and self.at[-1] >= frames:
            raise UsageError(
                f"at: a picture stands at frame {self.at[-1]}, but the clip's frames are 0 to {frames - 1}."
            )
        if self.masks is not None and len(self.masks) != frames:
            raise UsageError(
                f"mask: {len(self.masks)} masks are given for {frames} frames; give one, or one a frame."
            )

    def factors(self, frames: int) -> list[float]:
        """The strength factor of each frame."""
        return curve_at(self.curve, torch.linspace(0, 1, frames)).tolist()

    def tokens(self, tokens: Float[Tensor, "KT C"], frame: int) -> Float[Tensor, "T C"]:
        """The tokens of ``frame``, given those of all pictures in a row."""
        if self.at is None:
            return tokens
        keys = tokens.unflatten(0, (len(self.at), -1))
        after = bisect_right(self.at, frame)
        if after in (0, len(self.at)):
            return keys[min(after, len(self.at) - 1)]
        before = after - 1
        part = (frame - self.at[before]) / (self.at[after] - self.at[before])
        return torch.lerp(keys[before], keys[after], part)


def track_of(
    at: Sequence[int] | None,
    curve: Points,
    masks: tuple[Float[Tensor, "1 1 H W"], ...] | None,
    *,
    pictures: int,
    plain: bool,
) -> Track | None:
    """The track of a prompt, or ``None`` if all frames get the same.

    ``pictures`` is the number of its pictures; ``plain`` says that they are neither combined nor weighted.
    Raises :class:`UsageError` if ``at`` does not match the pictures.
    """
    track = Track(None if at is None else tuple(at), curve, masks)
    if track.at is not None and len(track.at) != pictures:
        raise UsageError(f"at: {len(track.at)} frames are given for {pictures} pictures; give one a picture.")
    if track.at is not None and not plain:
        raise UsageError("at: pictures with a frame each can be neither combined nor weighted.")
    return None if track.static else track
