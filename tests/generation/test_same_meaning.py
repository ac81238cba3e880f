"""A field means the same in a request and in ``set_prompt``: the same picture, or the same refusal."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import tiny
from facemodels import pack, photo
from faces import face_state
from imprompt import packed
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.errors import ImpromptError, UsageError
from imprompt.generation.engine import Engine
from imprompt.generation.families import find_base
from imprompt.generation.pipelines import load, scheduler_for
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import Request

ACTING = {
    "weights": [1.0, 3.0],
    "scale": 0.4,
    "profile": "1,0,0.5,0",
    "start": 0.4,
    "end": 0.4,
    "curve": "fade-out",
    "mask": "mask.png",
    "feather": 0.6,
    "text": "a dog",
    "negative": "other.png",
    "noise": "shuffle:0.8",
    "combine": "average",
    "framing": "pad",
    "sharpen": 0.9,
    "scaling": "k+v-penalty",
    "select": "0-1",
}
"""Field → a value that changes what two pictures draw; what acts on clips or faces alone is not listed."""
ELSEWHERE = {"image", "features", "tokens", "adapter", "at", "frame_curve", "face", "s_scale"}
"""Where the pictures come from, whose they are, and what acts on clips or faces alone."""


class Doors:
    """One base and adapter, drawn through the engine and by hand."""

    def __init__(self, base: Path, adapter: Path, pictures: Path) -> None:
        self.engine, self.pictures = Engine(), pictures
        self.fields = {"base": str(base), "adapter": str(adapter), "steps": 3, "seed": 5, "guidance": 4}
        self.pipe = load(find_base(str(base)), "generate", torch.float32)
        for part in (self.pipe.unet, self.pipe.vae):
            packed.pack(part)  # as the engine does, which rounds differently
        self.adapter = IPAdapter.from_pretrained(str(adapter))

    def prompt(self, **fields: object) -> ImagePrompt:
        there = {
            name: str(self.pictures / value) if name in ("mask", "negative") and value else value
            for name, value in fields.items()
        }
        return ImagePrompt([self.pictures / "wide.png", self.pictures / "ref.png"], **there)

    def by_request(self, prompt: ImagePrompt) -> np.ndarray:
        scale = {} if prompt.scale is not None else {"scale": 1}
        return np.asarray(
            self.engine.run(Request(prompt="a cat", images=[prompt], **scale, **self.fields)).images[0]
        )

    def by_hand(self, prompt: ImagePrompt) -> np.ndarray:
        self.pipe.scheduler = scheduler_for(self.pipe, None)
        self.adapter.attach(self.pipe)
        try:
            self.adapter.set_prompt(prompt)
            pixels = self.pipe(
                "a cat", negative_prompt="", num_inference_steps=3, guidance_scale=4, width=32, height=32,
                generator=torch.Generator().manual_seed(5), output_type="np",
            ).images[0]  # fmt: skip
        finally:
            self.adapter.clear_prompt()
            self.adapter.detach()
        return (pixels * 255).round().astype(np.uint8)

    @cache  # noqa: B019  # lives as long as the module's fixture
    def plain(self, *fields: tuple[str, object]) -> np.ndarray:
        """What the pictures draw with nothing but ``fields``."""
        return self.by_hand(self.prompt(**dict(fields)))


@pytest.fixture(scope="module")
def doors(base: Path, pictures: Path) -> Doors:
    return Doors(base, base / "adapters", pictures)


def test_every_field_is_in_the_table() -> None:
    assert set(ImagePrompt.model_fields) == set(ACTING) | ELSEWHERE


@pytest.mark.parametrize("name", ACTING)
def test_a_field_means_the_same_through_both_doors(doors: Doors, name: str) -> None:
    beside = {"mask": "mask.png"} if name in ("feather", "text") else {}
    if name == "text":
        beside["scale"] = 0.0
    prompt = doors.prompt(**{**beside, name: ACTING[name]})
    drawn = doors.by_request(prompt)
    assert np.array_equal(drawn, doors.by_hand(prompt))
    assert not np.array_equal(drawn, doors.plain(*beside.items()))


fields = st.fixed_dictionaries(
    {},
    optional={
        name: st.just(value) for name, value in ACTING.items() if name not in ("noise", "start", "end")
    },
).filter(lambda chosen: "mask" in chosen or not chosen.keys() & {"feather", "text"})


@given(fields, st.sampled_from([(0.0, 1.0), (0.0, 0.6), (0.3, 1.0)]))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fields_together_mean_the_same_through_both_doors(
    doors: Doors, chosen: dict[str, object], window: tuple[float, float]
) -> None:
    prompt = doors.prompt(**chosen, start=window[0], end=window[1])
    assert np.array_equal(doors.by_request(prompt), doors.by_hand(prompt))


def test_the_negative_is_sharpened_and_framed_as_the_prompt_is(doors: Doors) -> None:
    wide = str(doors.pictures / "wide.png")
    shown = ImagePrompt(doors.pictures / "ref.png", negative=wide, sharpen=0.8, framing="pad")
    doors.adapter.attach(doors.pipe)
    try:
        doors.adapter.set_prompt(shown)
        tokens = doors.adapter.samples[0][0].negative
        features = doors.adapter.encode([wide], "pad", sharpen=0.8)
        expected = doors.adapter.projection(features.pooled)[0]
    finally:
        doors.adapter.detach()
    torch.testing.assert_close(tokens, expected)
    assert np.array_equal(doors.by_request(shown), doors.by_hand(shown))


def test_framing_has_no_effect_on_a_face_and_both_doors_say_so(tmp_path: Path) -> None:
    pipe = tiny.tiny_sdxl()
    pipe.save_pretrained(tmp_path / "base")
    made = IPAdapter.from_state_dict(face_state(pipe.unet, rank=None), variant="faceid")
    path = made.save_pretrained(tmp_path, "ip-adapter-faceid_tiny.safetensors")
    face = IPAdapter.from_pretrained(path)
    pack(tmp_path / "buffalo_l")
    photo((160, 320, "red")).save(tmp_path / "me.png")
    prompt = ImagePrompt(tmp_path / "me.png", framing="pad", sharpen=0.5)
    request = Request(
        images=[prompt], base=str(tmp_path / "base"), adapter=str(path), size=32, steps=1, seed=1,
        face_model=str(tmp_path / "buffalo_l"),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="non-commercial"):
        face.face_embedder = tmp_path / "buffalo_l"
    refusals = []
    for door in (lambda: Engine().run(request), lambda: face.set_prompt(prompt)):
        with pytest.raises(UsageError, match="framing: has no effect on adapter") as said:
            door()
        refusals.append(str(said.value))
    assert refusals[0] == refusals[1]


@pytest.mark.parametrize(
    "fields",
    [{"face": 1}, {"s_scale": 0.5}, {"select": "9"}, {"profile": "1,0"}, {"negative": "gone.png"}],
)
def test_what_one_door_refuses_the_other_does_too(doors: Doors, fields: dict[str, object]) -> None:
    for door in (doors.by_request, doors.by_hand):
        with pytest.raises(ImpromptError):
            door(doors.prompt(**fields))


def test_pictures_in_memory_and_on_disk_are_the_same(doors: Doors) -> None:
    names = [doors.pictures / "wide.png", doors.pictures / "ref.png"]
    ways = [names, [path.read_bytes() for path in names], [Image.open(path) for path in names]]
    first, *others = (doors.by_hand(ImagePrompt(way)) for way in ways)
    assert all(np.array_equal(first, other) for other in others)
