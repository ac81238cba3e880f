"""The judge on drawn shapes: it learns them, knows what it was not shown, and survives saving."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

from imprompt.data.rows import Row
from imprompt.errors import InputError, ModelError

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "emoji" / "lab"))
import bundled_judge as judging
from bundled_judge import Judge, train_judge

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
    judge, rejected = train_judge(rows * 6, epochs=12, batch=12, seed=1, check=True, log=lambda line: None)
    assert not rejected
    return judge


def test_the_judge_learns_concepts_and_styles_held_out_or_not(trained, rows):
    images = [Image.open(row.file) for row in rows]
    assert trained.concepts == ("bar", "cross", "disc", "square")
    assert trained.style(images) == [row.groups["style"] for row in rows]
    best = [trained.concepts[index] for index in trained.concept_scores(images).argmax(1).tolist()]
    assert sum(name == row.groups["concept"] for name, row in zip(best, rows, strict=True)) >= 7


def test_a_second_judge_tells_what_is_left_on_pictures_it_never_saw(trained):
    """It cannot name a concept it was never shown, so only the style is measured of these."""
    unseen = {name for name in trained.ceiling if name.startswith("unseen/")}
    assert unseen == {"unseen/held_out_concept/style"}
    assert {"degraded/style", "degraded/concept_top1", "degraded/concept_top5"} <= set(trained.ceiling)


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
    assert not list(tmp_path.glob("*.part"))


def test_the_second_judge_never_looks_at_held_out_pictures(rows, monkeypatch):
    seen = []
    original = judging.augment_for_judge
    monkeypatch.setattr(
        judging, "augment_for_judge", lambda pixels, source: seen.append(pixels) or original(pixels, source)
    )
    train_judge(rows, epochs=2, batch=3, check=True, log=lambda line: seen.append(line))
    second = next(place for place, one in enumerate(seen) if "without held-out" in str(one))
    held_out = judging.to_pixels([Image.open(row.file) for row in rows if not row.trainable])

    def shown(batches):
        pictures = [one for batch in batches if isinstance(batch, torch.Tensor) for one in batch]
        assert pictures
        return any(torch.equal(one, other) for one in pictures for other in held_out)

    assert shown(seen[:second])
    assert not shown(seen[second:])


def test_the_autoencoder_adds_versions_of_every_picture(rows):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), sample_size=64,
    )  # fmt: skip
    said = []
    judge, _ = train_judge(rows, vae=vae.eval(), epochs=1, batch=4, log=said.append)
    assert f"8 pictures in {1 + len(judging.LATENT_NOISE)} versions" in said[0]
    assert {"autoencoder/style", "autoencoder/concept_top5"} <= set(judge.ceiling)


def test_changed_colours_do_not_count_as_style(rows):
    pixels = judging.to_pixels([Image.open(rows[0].file)]).expand(64, -1, -1, -1)
    changed, kept = judging.augment_for_judge(pixels, torch.Generator().manual_seed(0))
    assert changed.shape == pixels.shape
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    assert 0.5 < float(kept.mean()) < 1
    grey = (changed.amax(1) - changed.amin(1)).mean((1, 2)) < 0.1
    assert not kept[grey].any()


def test_the_same_seed_trains_the_same_judge(rows):
    first, second = (train_judge(rows, epochs=1, batch=3, seed=4, log=lambda line: None)[0] for _ in range(2))
    for name, tensor in first.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name]), name


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
        train_judge(rows[:1], epochs=1, log=lambda line: None)


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
    (tmp_path / "words.txt").write_text("disc\nbar\ncross\n")
    asked = ["--data", str(folder), "--out", str(tmp_path), "--epochs", "1", "--batch", "3", "--check"]
    assert judging.main([*asked, "--concepts", str(tmp_path / "words.txt")]) == 0
    torch.set_num_threads(threads)
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "judge.json").read_text())
    assert Judge.load(tmp_path).concepts == ("bar", "cross", "disc")
    assert judging.main(["--data", str(tmp_path / "none"), "--out", str(tmp_path)]) == 4
    assert judging.main([*asked, "--vae", str(tmp_path)]) == 3
