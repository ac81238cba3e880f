"""InstantID on a tiny SDXL base: a photo says who, another how the face stands."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel

import tiny
from controls import saved, tiny_controlnet
from facemodels import pack, photo
from faces import face_state
from imprompt import output
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.errors import InputError, UsageError
from imprompt.generation.engine import Engine
from imprompt.schema.request import Request

pytestmark = pytest.mark.filterwarnings("ignore:the face models")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instantid")
    pipe = tiny.tiny_sdxl()
    pipe.save_pretrained(folder / "base")
    adapter = IPAdapter.from_state_dict(face_state(pipe.unet, "faceid-raw", rank=None), variant="faceid-raw")
    adapter.save_pretrained(folder, "instantid.safetensors")
    saved(tiny_controlnet("sdxl"), folder / "net")
    pack(folder / "antelopev2")
    photo((16, 32, "red"), size=(64, 64)).save(folder / "me.png")
    photo((32, 16, "red"), size=(64, 64)).save(folder / "pose.png")
    photo(size=(64, 64)).save(folder / "sky.png")
    return folder


def asked(place: Path, **fields: object) -> Request:
    common = {
        "prompt": "a cat", "base": str(place / "base"), "adapter": str(place / "instantid.safetensors"),
        "face_model": str(place / "antelopev2"), "size": (64, 64), "steps": 2, "seed": 3,
        "images": [str(place / "me.png")],
        "controls": [{"kind": "face", "path": str(place / "pose.png"), "model": str(place / "net")}],
    }  # fmt: skip
    return Request(**{**common, **fields})


def pixels(result: object) -> np.ndarray:
    return np.stack([np.asarray(image, float) for image in result.images])  # type: ignore[attr-defined]


def test_who_comes_from_the_photo_and_the_pose_from_another(place: Path, tmp_path: Path) -> None:
    engine = Engine()
    first = engine.run(asked(place))
    again = pixels(engine.run(asked(place)))
    assert np.array_equal(pixels(first), again)
    control = {"kind": "face", "path": str(place / "me.png"), "model": str(place / "net")}
    assert not np.array_equal(pixels(engine.run(asked(place, controls=[control]))), again)
    weak = {**control, "path": str(place / "pose.png"), "scale": 0.3}
    assert not np.array_equal(pixels(engine.run(asked(place, controls=[weak]))), again)
    assert not np.array_equal(pixels(engine.run(asked(place, scale=0.3))), again)
    files = output.save(first, tmp_path / "a.png", maps=True)
    assert files[1].name == "a-control-1-face.png"
    request = output.read_request(files[0])
    assert np.array_equal(pixels(engine.run(request)), again)
    finished = {"kind": "none", "path": str(files[1]), "model": f"{place / 'net'}:face"}
    assert np.array_equal(pixels(engine.run(asked(place, controls=[finished]))), again)


def test_the_controlnet_hears_the_face_and_the_text_elsewhere(place: Path) -> None:
    """The same map without the face in its text is another picture, and other controls go on as they do."""
    engine = Engine()
    heard = engine.run(asked(place))
    drawn = {"kind": "none", "path": "map", "model": str(place / "net")}
    plain = asked(place, controls=[drawn])
    deaf = engine.run(plain, pictures={"map": heard.maps[0]})
    assert np.abs(pixels(heard) - pixels(deaf)).max() > 2
    both = [drawn, {"kind": "face", "path": str(place / "pose.png"), "model": str(place / "net")}]
    mixed = engine.run(asked(place, controls=both), pictures={"map": heard.maps[0]})
    assert not np.array_equal(pixels(mixed), pixels(heard))
    assert np.array_equal(pixels(engine.run(plain, pictures={"map": heard.maps[0]})), pixels(deaf))


def test_several_pictures_are_a_batch_with_the_same_face(place: Path) -> None:
    one_by_one = pixels(Engine().run(asked(place, count=2, exact=True)))
    together = pixels(Engine().run(asked(place, count=2)))
    assert np.abs(one_by_one - together).max() <= 1


@pytest.mark.parametrize("fields", [{"guidance": 1}, {"speed": "balanced"}])
def test_conditional_rows_alone_all_hear_the_face(
    place: Path, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pictures without guidance are as many rows as one picture with it."""
    heard: list[torch.Tensor] = []
    forward = ControlNetModel.forward

    def noted(self: ControlNetModel, *args: object, **call: object) -> object:
        heard.append(call["encoder_hidden_states"])  # type: ignore[arg-type]
        return forward(self, *args, **call)  # type: ignore[arg-type]

    monkeypatch.setattr(ControlNetModel, "forward", noted)
    Engine().run(asked(place, count=2, **fields))
    alone = [states for states in heard if len(states) == 2]
    assert alone
    assert all(torch.equal(first, second) for first, second in alone)


def test_without_a_face_it_is_refused(place: Path) -> None:
    control = {"kind": "face", "path": str(place / "sky.png"), "model": str(place / "net")}
    with pytest.raises(InputError, match="no face"):
        Engine().run(asked(place, controls=[control]))
    drawn = {"kind": "none", "path": str(place / "pose.png"), "model": f"{place / 'net'}:face"}
    with pytest.raises(UsageError, match=r"reads the face.*sdxl-instantid"):
        Engine().run(asked(place, images=[], adapter=None, face_model=None, controls=[drawn]))


def test_a_face_model_beside_a_face_control_is_told_what_is_missing_not_that_it_has_no_effect(
    place: Path,
) -> None:
    """It finds the points that are followed; without a face adapter, what is wrong is the adapter."""
    missing = r"control face: .*no image prompt shows one to a face adapter; give .*sdxl-instantid"
    with pytest.raises(UsageError, match=missing):
        Engine().run(asked(place, images=[], adapter=None))
    whole = IPAdapter.new(tiny.tiny_sdxl().unet, feature_width=16)
    whole.save_pretrained(place, "whole.safetensors")
    with pytest.raises(UsageError, match=missing):
        Engine().run(asked(place, adapter=str(place / "whole.safetensors")))
    with pytest.raises(UsageError, match="face_model: has no effect on adapters that read whole pictures"):
        Engine().run(asked(place, adapter=str(place / "whole.safetensors"), controls=[]))
