"""The switch that leaves only what may be used commercially: what it refuses, and what it leaves alone."""

import json
from pathlib import Path

import pytest

from facemodels import recogniser, scrfd
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.app.cli import main
from imprompt.catalog import adapters, bases, controls, licences, motions
from imprompt.encoders.face_onnx import OnnxFaces
from imprompt.errors import ModelError
from layouts import PUBLISHED
from tiny import random_adapter_state, tiny_unet


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(licences.SWITCH, "1")


def test_the_list_has_what_may_be_used_commercially(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--commercial", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(bases()) - set(shown["bases"]) == {"kolors", "sd35", "flux", "flux-fill", "flux-kontext"}
    faces = {name for name, row in adapters().items() if row.face_pack}
    assert set(adapters()) - set(shown["adapters"]) == faces | {
        "kolors-plus", "sd35-instantx", "flux-xlabs", "flux-instantx", "flux-redux"
    }  # fmt: skip
    assert set(motions()) - set(shown["motions"]) == {name for name in motions() if name != "emoji-motion"}
    assert set(controls()) - set(shown["controls"]) == {
        "sd15-sparse-rgb", "sd15-sparse-scribble", "sdxl-instantid", "flux-union", "flux-union-2"
    }  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["--base", "sd15", "--adapter", "sd15-faceid", "--image", "me.png"],
        ["--base", "kolors"],
        ["--base", "sd15", "--control", "scribble:me.png,model=sd15-sparse-scribble"],
        ["--base", "sd15", "--adapter", "sdxl-instantid", "--image", "me.png"],
    ],
)
def test_the_rest_is_refused_before_anything_is_fetched(
    words: list[str], switch: None, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny import picture

    monkeypatch.chdir(tmp_path)
    picture(1).save("me.png")
    assert main(["generate", "a", *words, "-q"]) == 3
    error = capsys.readouterr().err
    assert "is not for commercial use" in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["me.png"]


def test_files_and_face_models_are_judged_by_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = next(each for each in PUBLISHED if each.name == "ip-adapter-faceid-portrait_sd15")
    file = layout.write(tmp_path, "mine")
    own = IPAdapter.from_state_dict(random_adapter_state(tiny_unet())).save_pretrained(tmp_path / "own")
    scrfd(tmp_path / "det.onnx")
    recogniser(tmp_path / "rec.onnx")
    models = tmp_path / "det.onnx", tmp_path / "rec.onnx"
    IPAdapter.from_pretrained(file)
    monkeypatch.setenv(licences.SWITCH, "1")
    with pytest.raises(ModelError, match=r"'mine' is not for commercial use.*InsightFace"):
        IPAdapter.from_pretrained(file)
    with pytest.raises(ModelError, match=r"rec\.onnx' is not for commercial use"):
        OnnxFaces(*models, "buffalo_l")
    assert OnnxFaces(*models, "own").space == "own"
    IPAdapter.from_pretrained(own)
    monkeypatch.setenv(licences.SWITCH, "0")
    IPAdapter.from_pretrained(file)
