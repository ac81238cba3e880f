"""Sizes of a projection by the shapes of its weights, and the shapes that all of them must have; no torch.

:func:`sizes_of` reads the sizes that a published ``image_proj`` leaves free, :func:`expected_shapes` says
what follows from them. The modules are made with the same sizes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from imprompt.catalog.variants import ProjectionKind
from imprompt.errors import ModelError

Shape = tuple[int, ...]
Shapes = Mapping[str, Sequence[int]]
HEAD_WIDTH = 64  # of every published resampler; its number of heads follows from to_q


@dataclass(frozen=True)
class Widths:
    """Inner sizes of a resampler."""

    width: int
    depth: int
    inner: int
    """The heads' total width."""
    hidden: int
    """Of each feed-forward."""

    @classmethod
    def of(cls, shapes: Shapes, width: int | None = None) -> "Widths":
        """Read from a resampler's shapes. Raises :class:`ModelError` for what no resampler has."""
        blocks = {key.split(".")[1] for key in shapes if key.startswith("layers.")}
        depth = 1 + max((int(block) for block in blocks if block.isdecimal()), default=0)
        if depth > len(blocks):
            raise ModelError(
                f"the resampler's blocks are not numbered 0 to {depth - 1}: found {sorted(blocks)}."
            )
        inner, columns = shape_of(shapes, "layers.0.0.to_q.weight", 2)
        hidden, _ = shape_of(shapes, "layers.0.1.1.weight", 2)
        if inner % HEAD_WIDTH:
            raise ModelError(
                f"'layers.0.0.to_q.weight' has {inner} rows, not a multiple of {HEAD_WIDTH}, a head's width."
            )
        return cls(width or columns, depth, inner, hidden)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a projection; those that its kind does not have are 0 or ``None``."""

    tokens: int
    """Of one picture; nominal for kinds that make one per patch."""
    cross_dim: int
    feature_width: int
    inner: int = 0
    """Hidden width of an MLP."""
    patch_width: int | None = None
    """Width of the second input of FaceID-Plus."""
    frequencies: int = 0
    """Width of the timestep's cosines and sines."""
    resampler: Widths = Widths(0, 0, 0, 0)
    time_width: int = 0
    """Width of the embedded timestep."""


def sizes_of(kind: ProjectionKind, shapes: Shapes) -> Sizes:
    """The sizes of a projection. Raises :class:`ModelError` when a shape that they are read from is missing
    or cannot be right."""
    return _KINDS[kind][0](shapes)


def expected_shapes(kind: ProjectionKind, sizes: Sizes) -> dict[str, Shape]:
    """Key → shape of all weights of a projection."""
    return dict(_KINDS[kind][1](sizes))


def shape_of(shapes: Shapes, key: str, dims: int) -> Shape:
    """The shape of a key. Raises :class:`ModelError` if it is missing or has another number of dimensions."""
    if key not in shapes:
        raise ModelError(f"'image_proj' has no '{key}'.")
    shape = tuple(shapes[key])
    if len(shape) != dims or 0 in shape:
        raise ModelError(f"'image_proj.{key}' has shape {shape}; {dims} non-zero dimensions were expected.")
    return shape


# ---- the kinds

_Weights = Iterator[tuple[str, Shape]]


def _linear_sizes(shapes: Shapes) -> Sizes:
    rows, feature_width = shape_of(shapes, "proj.weight", 2)
    (cross_dim,) = shape_of(shapes, "norm.weight", 1)
    return Sizes(_ratio(rows, cross_dim, "proj.weight", "norm.weight"), cross_dim, feature_width)


def _linear(sizes: Sizes) -> _Weights:
    yield from _layer("proj", sizes.feature_width, sizes.tokens * sizes.cross_dim)
    yield from _norm("norm", sizes.cross_dim)


def _patch_mlp_sizes(shapes: Shapes) -> Sizes:
    inner, feature_width = shape_of(shapes, "proj.0.weight", 2)
    (cross_dim,) = shape_of(shapes, "proj.3.weight", 1)
    return Sizes(257, cross_dim, feature_width, inner)


def _patch_mlp(sizes: Sizes) -> _Weights:
    yield from _layer("proj.0", sizes.feature_width, sizes.inner)
    yield from _layer("proj.2", sizes.inner, sizes.cross_dim)
    yield from _norm("proj.3", sizes.cross_dim)


def _mlp_sizes(shapes: Shapes) -> Sizes:
    inner, feature_width = shape_of(shapes, "proj.0.weight", 2)
    rows, _ = shape_of(shapes, "proj.2.weight", 2)
    (cross_dim,) = shape_of(shapes, "norm.weight", 1)
    return Sizes(_ratio(rows, cross_dim, "proj.2.weight", "norm.weight"), cross_dim, feature_width, inner)


def _mlp(sizes: Sizes) -> _Weights:
    yield from _layer("proj.0", sizes.feature_width, sizes.inner)
    yield from _layer("proj.2", sizes.inner, sizes.tokens * sizes.cross_dim)
    yield from _norm("norm", sizes.cross_dim)


def _redux_sizes(shapes: Shapes) -> Sizes:
    inner, feature_width = shape_of(shapes, "redux_up.weight", 2)
    cross_dim, _ = shape_of(shapes, "redux_down.weight", 2)
    return Sizes(729, cross_dim, feature_width, inner)


def _redux(sizes: Sizes) -> _Weights:
    yield from _layer("redux_up", sizes.feature_width, sizes.inner)
    yield from _layer("redux_down", sizes.inner, sizes.cross_dim)


def _resampler_sizes(shapes: Shapes) -> Sizes:
    _, tokens, _ = shape_of(shapes, "latents", 3)
    cross_dim, _ = shape_of(shapes, "proj_out.weight", 2)
    feature_width = shape_of(shapes, "proj_in.weight", 2)[1]
    return Sizes(tokens, cross_dim, feature_width, resampler=Widths.of(shapes))


def _resampler(sizes: Sizes) -> _Weights:
    yield "latents", (1, sizes.tokens, sizes.resampler.width)
    yield from _blocks(sizes.feature_width, sizes)


def _timed_sizes(shapes: Shapes) -> Sizes:
    _, frequencies = shape_of(shapes, "time_embedding.linear_1.weight", 2)
    plain = _resampler_sizes(shapes)
    return replace(plain, frequencies=frequencies, time_width=plain.resampler.width)


def _timed(sizes: Sizes) -> _Weights:
    yield from _resampler(sizes)
    yield from _layer("time_embedding.linear_1", sizes.frequencies, sizes.time_width)
    yield from _layer("time_embedding.linear_2", sizes.time_width, sizes.time_width)


def _face_resampler_sizes(shapes: Shapes) -> Sizes:
    prefix = "perceiver_resampler."
    inside = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    faces = _mlp_sizes(shapes)  # whose tokens are as wide as the resampler
    _, patch_width = shape_of(inside, "proj_in.weight", 2)
    cross_dim, _ = shape_of(inside, "proj_out.weight", 2)
    resampler = Widths.of(inside, faces.cross_dim)
    return replace(faces, cross_dim=cross_dim, patch_width=patch_width, resampler=resampler)


def _face_resampler(sizes: Sizes) -> _Weights:
    yield from _mlp(replace(sizes, cross_dim=sizes.resampler.width))
    for key, shape in _blocks(sizes.patch_width or 0, sizes):
        yield f"perceiver_resampler.{key}", shape


_KINDS: dict[ProjectionKind, tuple[Callable[[Shapes], Sizes], Callable[[Sizes], _Weights]]] = {
    "linear": (_linear_sizes, _linear),
    "resampler": (_resampler_sizes, _resampler),
    "timed-resampler": (_timed_sizes, _timed),
    "patch-mlp": (_patch_mlp_sizes, _patch_mlp),
    "mlp": (_mlp_sizes, _mlp),
    "face-resampler": (_face_resampler_sizes, _face_resampler),
    "redux": (_redux_sizes, _redux),
}


def _blocks(feature_width: int, sizes: Sizes) -> _Weights:
    """The weights of a resampler, but for its queries."""
    widths = sizes.resampler
    width, hidden = widths.width, widths.hidden
    yield from _layer("proj_in", feature_width, width)
    for block in (f"layers.{i}" for i in range(widths.depth)):
        yield from _norm(f"{block}.0.norm1", width)
        yield from _norm(f"{block}.0.norm2", width)
        yield f"{block}.0.to_q.weight", (widths.inner, width)
        yield f"{block}.0.to_kv.weight", (2 * widths.inner, width)
        yield f"{block}.0.to_out.weight", (width, widths.inner)
        yield from _norm(f"{block}.1.0", width)
        yield f"{block}.1.1.weight", (hidden, width)
        yield f"{block}.1.3.weight", (width, hidden)
        if sizes.time_width:
            yield from _layer(f"{block}.2.1", width, 4 * width)
    yield from _layer("proj_out", width, sizes.cross_dim)
    yield from _norm("norm_out", sizes.cross_dim)


def _layer(name: str, width_in: int, width_out: int) -> _Weights:
    yield f"{name}.weight", (width_out, width_in)
    yield f"{name}.bias", (width_out,)


def _norm(name: str, width: int) -> _Weights:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _ratio(rows: int, width: int, of: str, by: str) -> int:
    """``rows / width``. Raises :class:`ModelError` if that is not a whole number."""
    if rows % width:
        raise ModelError(f"'image_proj.{of}' has {rows} rows, not a multiple of the width {width} of '{by}'.")
    return rows // width
