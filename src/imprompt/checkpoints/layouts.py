"""Table of the published layouts of adapter files: names and numbers of keys, weights of a site.

In memory all layouts have one form: ``image_proj.…`` for the projection and ``ip_adapter.N.to_k_ip.weight``
and so on for attention site ``N``, numbered as published. Files keep their published names.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from imprompt.catalog import Backbone

SECTIONS = ("image_proj", "ip_adapter")
T = TypeVar("T")
_KEY_VALUE = (("to_k_ip.weight", ("width", "cross")), ("to_v_ip.weight", ("width", "cross")))


@dataclass(frozen=True)
class Layout:
    """A published layout."""

    name: str
    backbone: Backbone
    """The architecture it is for."""
    numbering: Literal["odd", "consecutive", "none"]
    """Sites are 1, 3, 5, … (UNets, where even numbers are self-attention), 0, 1, 2, …, or absent."""
    variants: tuple[tuple[str, tuple[str, ...]], ...]
    """(a key of ``image_proj``, the variants whose projection has it); the first match counts."""
    weights: tuple[tuple[str, tuple[str, ...]], ...] = _KEY_VALUE
    """The weights of each site: name and dimensions. ``width`` is that of the site, ``cross`` of the tokens,
    ``time`` of the projection's embedded timestep; others are the same at all sites."""
    names: tuple[tuple[str, str, str, str], ...] = ()
    """Published names: (pattern, our form, pattern of our form, published form), for ``re.sub``."""
    mark: str = ""
    """A key, in our form, that only this layout has."""


_PLAIN = (
    ("perceiver_resampler.proj_in.weight", ("faceid-plus", "faceid-plusv2")),
    ("latents", ("resampler", "faceid-raw")),
    ("proj.3.weight", ("full-face",)),
    ("proj.0.weight", ("faceid",)),
    ("proj.weight", ("linear",)),
)
_LAYOUTS = (
    Layout(
        "redux", "flux", "none", (("redux_up.weight", ("redux",)),), (), mark="image_proj.redux_up.weight",
        names=((r"^redux_(up|down)\.", r"image_proj.redux_\1.", r"image_proj\.redux_", "redux_"),),
    ),
    Layout(
        "instantx-sd3", "sd3", "consecutive", (("time_embedding.linear_1.weight", ("instantx-sd3",)),),
        (
            *_KEY_VALUE,
            ("norm_ip.linear.weight", ("2·cross", "time")), ("norm_ip.linear.bias", ("2·cross",)),
            ("norm_q.weight", ("head",)), ("norm_k.weight", ("head",)), ("norm_ip_k.weight", ("head",)),
        ),
        mark="ip_adapter.0.norm_ip.linear.weight",
    ),
    Layout(
        "xlabs", "flux", "consecutive", (("proj.weight", ("xlabs",)),),
        (*_KEY_VALUE, ("to_k_ip.bias", ("width",)), ("to_v_ip.bias", ("width",))),
        mark="ip_adapter.0.to_k_ip.bias",
        names=(
            (
                r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\.(weight|bias)$",
                r"ip_adapter.\1.to_\2_ip.\3",
                r"ip_adapter\.(\d+)\.to_([kv])_ip\.(weight|bias)$",
                r"double_blocks.\1.processor.ip_adapter_double_stream_\2_proj.\3",
            ),
            (r"ip_adapter_proj_model\.", "image_proj.", r"image_proj\.", "ip_adapter_proj_model."),
        ),
    ),
    Layout(
        "instantx-flux", "flux", "consecutive", (("proj.0.weight", ("instantx-flux",)),),
        mark="ip_adapter.0.to_k_ip.weight",
    ),
    # Kolors' FaceID-Plus has its keys and values under adapter_modules.
    Layout("unet", "unet", "odd", _PLAIN, names=((r"adapter_modules\.", "ip_adapter.", "^$", ""),)),
)  # fmt: skip
"""In the order in which they are recognised. Sources: the published files of the reference IP-Adapter, XLabs,
InstantX and Black Forest Labs."""


def our_form(flat: Mapping[str, T]) -> tuple[dict[str, T], Layout]:
    """Rename keys to our form; returns them and the layout they had."""
    patterns = [(re.compile(published), ours) for each in _LAYOUTS for published, ours, _, _ in each.names]
    renamed: dict[str, T] = {}
    for key, value in flat.items():
        name = next((new for pattern, ours in patterns if (new := pattern.sub(ours, key)) != key), key)
        renamed[name if name not in renamed else key] = value
    layout = next(each for each in _LAYOUTS if each.mark in renamed or each.name == "unet")
    return renamed, layout


def published_form(keys: Iterable[str], layout: Layout) -> dict[str, str]:
    """Our name → published name."""
    names = {}
    for key in keys:
        renamed = (re.sub(f"^{pattern}", published, key) for _, _, pattern, published in layout.names)
        names[key] = next((name for name in renamed if name != key), key)
    return names
