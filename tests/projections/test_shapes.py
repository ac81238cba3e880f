"""The shapes that are expected without torch are those of the modules."""

import pytest

from imprompt.catalog.variants import VARIANTS
from imprompt.projections.build import skeleton
from imprompt.projections.shapes import expected_shapes, sizes_of
from layouts import SMALL, SMALL_TRANSFORMERS

PROJECTIONS = SMALL | {
    name: {key.removeprefix("image_proj."): shape for key, shape in shapes.items() if "ip_adapter" not in key}
    for name, shapes in SMALL_TRANSFORMERS.items()
    if name != "xlabs"  # a linear one under other names
}


@pytest.mark.parametrize("variant", PROJECTIONS)
def test_the_shapes_are_those_of_the_module(variant: str) -> None:
    kind, shapes = VARIANTS[variant].projection, PROJECTIONS[variant]
    expected = expected_shapes(kind, sizes_of(kind, shapes))
    module = skeleton(VARIANTS[variant], shapes)
    assert [*expected.items()] == [(key, tuple(value.shape)) for key, value in module.state_dict().items()]
    assert expected == shapes
