"""Any steering that can be said comes back the same from JSON, from the command line and from a picture."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imprompt import output
from imprompt.schema import options as words
from imprompt.schema.profiles import PROFILES
from imprompt.schema.prompt import ImagePrompt, TextRegion
from imprompt.schema.request import Request

share = st.floats(0, 1).map(lambda x: round(x, 4))
number = st.floats(-10, 10).map(lambda x: round(x, 4))
path = st.from_regex(r"[a-z][a-z0-9 ,._/-]{0,20}\.png", fullmatch=True).filter(lambda p: "=" not in p)
said = st.text("abcdefghij ,.'ü“”", min_size=1, max_size=30).map(str.strip).filter(bool)
patterns = st.dictionaries(
    st.sampled_from(["default", "up_blocks.1", "*.attentions.0", "mid_block"]), number, min_size=1
)
profile = (
    st.sampled_from(sorted(PROFILES))
    | st.just("style-and-composition:0.5")
    | st.lists(number, min_size=2, max_size=9).map(tuple)
    | patterns
)


@st.composite
def refs(draw: Any) -> ImagePrompt:
    start, end = sorted((draw(share), draw(share)))
    fields: dict[str, Any] = {
        "image": draw(path),
        "scale": draw(st.none() | number),
        "start": start,
        "end": end,
        "profile": draw(profile),
        "framing": draw(st.sampled_from(words.FRAMINGS)),
        "sharpen": draw(share),
        "curve": draw(st.sampled_from([*words.CURVES, "0:1,0.5:0.2,1:0"])),
        "scaling": draw(st.sampled_from(words.SCALINGS)),
        "select": draw(st.none() | st.just("0-3,8")),
        "adapter": draw(st.none() | st.just("emoji-plus")),
    }
    if draw(st.booleans()):
        fields |= {"mask": draw(path), "feather": draw(share), "text": draw(st.none() | said)}
    if draw(st.booleans()):
        fields["noise"] = draw(st.sampled_from(["fade", "shuffle:0.8"]))
    else:
        fields["negative"] = draw(st.none() | path)
    return ImagePrompt(**fields)


def as_flag(ref: ImagePrompt) -> str:
    """The reference as one would type it: every field that is not as by default."""
    parts = [ref.image]
    for name, field in ImagePrompt.model_fields.items():
        value = getattr(ref, name)
        if name == "image" or value == field.default:
            continue
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        elif isinstance(value, dict):
            value = ",".join(f"{key}:{weight}" for key, weight in value.items())
        parts.append(f"{name}={value}")
    return ",".join(parts)


@given(refs())
@settings(max_examples=80, deadline=None)
def test_what_is_typed_is_what_is_meant(ref: ImagePrompt) -> None:
    assert ImagePrompt.parse(as_flag(ref)) == ref


@given(said, path, share)
@settings(max_examples=40, deadline=None)
def test_what_is_typed_of_a_region_is_what_is_meant(text: str, mask: str, feather: float) -> None:
    region = TextRegion(text=text, mask=mask, feather=feather)
    assert TextRegion.parse(f"{text},mask={mask},feather={feather}") == region
    request = Request(regions=[region], seed=1)
    assert Request.from_json(request.to_json()) == request


@given(st.lists(refs(), min_size=1, max_size=3), st.none() | st.floats(0, 20))
@settings(max_examples=40, deadline=None)
def test_requests_come_back_from_json_and_from_pictures(
    tmp_path_factory: Any, images: list[ImagePrompt], image_guidance: float | None
) -> None:
    request = Request(prompt="an owl", images=images, image_guidance=image_guidance, seed=3)
    assert Request.from_json(request.to_json()) == request

    class Drawn:
        provenance: dict[str, str] = {}  # noqa: RUF012

    drawn = Drawn()
    drawn.images, drawn.request = [Image.new("RGB", (4, 4))], request  # type: ignore[attr-defined]
    for suffix in ("png", "webp"):
        place = tmp_path_factory.mktemp("x") / f"x.{suffix}"
        output.save(drawn, place)  # type: ignore[arg-type]
        assert output.read_request(place) == request
