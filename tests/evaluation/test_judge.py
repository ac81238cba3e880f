"""The judge on drawn shapes: it learns them, keeps held-out pictures out, and survives saving."""

import json

import pytest
import torch
from PIL import Image, ImageDraw

from imprompt.errors import InputError, ModelError
from imprompt.evaluation import judge as judging
from imprompt.evaluation.judge import Gallery, Judge, JudgeNetwork, train_judge
from imprompt.evaluation.rows import Row

SHAPES = ("disc", "square", "bar", "cross")


def draw(shape, style, size=64):
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    how = {"fill": (200, 30, 30)} if style == "flat" else {"outline": (0, 0, 160), "width": 4}
    if shape == "disc":
        pen.ellipse((12, 12, 52, 52), **how)
    elif shape == "square":
        pen.rectangle((14, 14, 50, 50), **how)
    elif shape == "bar":
        pen.rectangle((4, 26, 60, 38), **how)
    else:
        pen.rectangle((26, 4, 38, 60), **how)
        pen.rectangle((4, 26, 60, 38), **how)
    return image


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    rows = []
    for shape in SHAPES:
        for style in ("flat", "line"):
            file = folder / f"{shape}_{style}.png"
            draw(shape, style).save(file)
            split = "held_out_concept" if shape == "cross" else "train"
            rows.append(Row(file, {}, {"concept": shape, "style": style}, split))
    return rows


@pytest.fixture(scope="module")
def trained(rows):
    torch.set_num_threads(1)
    judge, rejected = train_judge(
        [*rows[:6] * 6, *rows[6:]], epochs=8, batch=12, seed=1, log=lambda line: None
    )
    assert not rejected
    return judge


def test_the_judge_learns_concepts_and_styles(trained, rows):
    images = [Image.open(row.file) for row in rows[:6]]
    assert trained.style(images) == [row.groups["style"] for row in rows[:6]]
    best = [names[0] for names in trained.concept_topk(images)]
    assert sum(name == row.groups["concept"] for name, row in zip(best, rows[:6], strict=True)) >= 5


def test_held_out_concepts_are_no_classes_but_can_be_retrieved(trained, rows):
    assert "cross" not in trained.concepts
    assert "cross" in trained.gallery.concepts
    assert set(trained.ceiling) == {"held_out_concept/style", "held_out_concept/retrieval_top5"}


def test_embeddings_are_unit_vectors(trained, rows):
    norms = trained.embed([Image.open(row.file) for row in rows]).norm(dim=1)
    assert torch.allclose(norms, torch.ones(len(rows)), atol=1e-5)


def test_a_saved_judge_says_the_same(trained, rows, tmp_path):
    trained.save(tmp_path / "judge.safetensors")
    again = Judge.load(tmp_path)
    images = [Image.open(row.file) for row in rows]
    assert torch.allclose(again.concept_scores(images), trained.concept_scores(images), atol=0.1)  # fp16
    assert again.style(images) == trained.style(images)
    assert again.ceiling == trained.ceiling
    assert again.gallery.concepts == trained.gallery.concepts
    assert not list(tmp_path.glob("*.part"))


def test_training_never_looks_at_held_out_pictures(rows, monkeypatch):
    seen = []
    original = judging._augment
    monkeypatch.setattr(
        judging, "_augment", lambda pixels, source: seen.append(pixels) or original(pixels, source)
    )
    train_judge(rows, epochs=2, batch=3, log=lambda line: None)
    held_out = judging.to_pixels([Image.open(row.file) for row in rows if not row.trainable])
    assert seen
    for batch in seen:
        for picture in batch:
            assert not any(torch.equal(picture, other) for other in held_out)


def test_the_same_seed_trains_the_same_judge(rows):
    first, second = (train_judge(rows, epochs=1, batch=3, seed=4, log=lambda line: None)[0] for _ in range(2))
    for name, tensor in first.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name]), name


def test_retrieval_leaves_out_the_references_own_style():
    network = JudgeNetwork(1, 2)
    gallery = Gallery(torch.eye(128)[:3], ("sun", "moon", "sun"), ("noto", "noto", "fluent"))
    judge = Judge(network, ["star"], ["noto", "fluent"], gallery=gallery)
    judge.embed = lambda images: torch.eye(128)[:1]  # type: ignore[method-assign]  # the noto sun itself
    picture = [Image.new("RGB", (64, 64))]
    assert judge.retrieve(picture, ["sun"], exclude_styles=[None], k=1).tolist() == [True]
    # Without noto only the fluent sun is left, which is not alike: only one concept competes, with cosine 0.
    assert judge.retrieve(picture, ["sun"], exclude_styles=["noto"], k=1).tolist() == [True]
    with pytest.raises(InputError, match="moon"):
        judge.retrieve(picture, ["moon"], exclude_styles=["noto"], k=1)


def test_unreadable_and_unlabelled_pictures_are_reported(rows, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    extra = [
        Row(broken, {}, {"concept": "disc", "style": "flat"}),
        Row(rows[0].file, {}, {"concept": "disc"}),
    ]
    _, rejected = train_judge([*rows, *extra], epochs=1, batch=3, log=lambda line: None)
    assert len(rejected) == 2
    assert "broken.png" in rejected[0].where


def test_nothing_to_train_on_is_an_error(rows):
    with pytest.raises(InputError, match="training pictures"):
        train_judge(rows[6:], epochs=1, log=lambda line: None)


@pytest.mark.parametrize("content", [b"", b"garbage" * 40])
def test_a_file_that_is_no_judge_is_refused(tmp_path, content):
    (tmp_path / "judge.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="not a judge"):
        Judge.load(tmp_path)
    with pytest.raises(ModelError, match="no judge"):
        Judge.load(tmp_path / "elsewhere.safetensors")


def test_the_command_line_writes_judge_and_ceilings(rows, tmp_path, capsys):
    folder = rows[0].file.parent
    with (folder / "metadata.jsonl").open("w") as handle:
        for row in rows:
            handle.write(
                json.dumps({"file_name": row.file.name, "groups": row.groups, "split": row.split}) + "\n"
            )
    threads = torch.get_num_threads()
    assert judging.main(["--data", str(folder), "--out", str(tmp_path), "--epochs", "1", "--batch", "3"]) == 0
    torch.set_num_threads(threads)
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "judge.json").read_text())
    assert judging.main(["--data", str(tmp_path / "none"), "--out", str(tmp_path)]) == 4
