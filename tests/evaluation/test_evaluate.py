"""`imprompt evaluate` on a tiny base: figures, comparison on the same seeds, resuming, one-line errors."""

import json
import math
import re
import shutil

import pytest
import torch
from PIL import Image, ImageDraw

import tiny
from facemodels import pack, photo
from imprompt.app.cli import main
from imprompt.errors import InputError, ModelError, UsageError
from imprompt.evaluation.cases import read_cases
from imprompt.evaluation.config import Contender, EvaluateConfig
from imprompt.evaluation.metrics import bootstrap, copy_score, diversity, paired
from imprompt.evaluation.report import html, table, to_json
from imprompt.evaluation.run import BARE, Difference, evaluate
from imprompt.evaluation.scorers import Scorer, tells_texts
from imprompt.generation.engine import Engine
from imprompt.generation.families import find_base


@pytest.fixture
def shown(tmp_path):
    folder = tmp_path / "shown"
    folder.mkdir()
    for number in range(3):
        tiny.picture(number, (40, 32)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a cat {number}")
    return folder


@pytest.fixture
def settings(tuned_base, shown):
    return {
        "source": str(shown), "base": tuned_base["base"], "steps": 2, "samples": 2, "scales": (1.0,),
        "contenders": (Contender(adapter=tuned_base["adapter"], label="one"),), "quiet": True,
    }  # fmt: skip


def means(report):
    return {(each.contender, each.name): each.value.mean for each in report.figures}


def test_every_task_is_measured_and_contenders_are_compared_on_the_same_seeds(settings, tuned_base):
    adapter = tuned_base["adapter"]
    twice = [Contender(adapter=adapter), Contender(adapter=adapter), Contender(adapter=adapter, scale=0)]
    report = evaluate(EvaluateConfig(**settings | {"contenders": tuple(twice)}))
    found = means(report)
    first, second, nothing = (name for name in report.by_case if name != BARE)
    assert second == f"{first} (2)"
    assert nothing.endswith("scale 0")
    for figure in ("CLIP-I", "copy", "diversity", "both CLIP-I", "both text kept", "both text found"):
        assert found[first, figure] == found[second, figure]
    assert (BARE, "both text found") not in found  # its own drawings are what others are held against
    assert found[nothing, "both text kept"] == pytest.approx(1, abs=1e-6)  # the bare base's own drawings
    assert found[nothing, "both CLIP-I"] == pytest.approx(found[BARE, "both CLIP-I"])
    same = [each for each in report.differences if (each.second, each.first) == (first, second)]
    assert len(same) >= 5
    assert all(each.value.mean == 0 and each.real is False and each.value.n == 3 for each in same)
    assert not report.settings["clip_t"]  # random encoders tell no captions apart, and it is said
    assert "no CLIP-T" in table(report)
    assert [point["scale"] for point in report.front] == [1.0] * 3
    json.loads(to_json(report), parse_constant=pytest.fail)


def test_one_picture_gives_no_interval_and_json_no_nan(settings):
    report = evaluate(EvaluateConfig(**settings | {"n": 1, "samples": 1}))
    stored = json.loads(to_json(report), parse_constant=pytest.fail)
    assert all(each["value"]["low"] is None for each in stored["figures"])
    assert {each.real for each in report.differences} == {None}
    assert "one picture" in table(report)


def test_few_pictures_and_rounding_make_no_real_difference(settings):
    report = evaluate(EvaluateConfig(**settings | {"samples": 1}))
    assert {each.real for each in report.differences} == {None}
    for text in (table(report), html(report)):
        assert "too few pictures (6 needed)" in text
    values = torch.linspace(0.1, 0.2, 8)
    assert Difference("CLIP-I", "a", "b", paired(values, torch.zeros(8))).real
    assert Difference("CLIP-I", "a", "b", paired(values * 1e-6, torch.zeros(8))).real is False


def test_a_picture_is_drawn_with_the_text_of_one_that_has_another(settings, shown):
    for number in range(3, 6):
        tiny.picture(number, (40, 32)).save(shown / f"{number}.png")
    for number in range(6):
        (shown / f"{number}.txt").write_text("a heart" if number < 3 else "an owl")
    cases, notes = read_cases(EvaluateConfig(**settings), find_base(settings["base"]))
    assert [case.text for case in cases] == ["an owl"] * 3 + ["a heart"] * 3
    assert not notes
    for number in range(6):
        (shown / f"{number}.txt").write_text("an owl")
    cases, notes = read_cases(EvaluateConfig(**settings), find_base(settings["base"]))
    assert {case.text for case in cases} == {"an owl"}
    assert "no other picture has another: 6" in notes[0]


def test_what_a_speed_costs_is_measured_as_any_other_setting(settings, tuned_base):
    each = [Contender(adapter=tuned_base["adapter"], label=speed, speed=speed) for speed in ("exact", "fast")]
    found = means(evaluate(EvaluateConfig(**settings | {"n": 1, "samples": 1, "contenders": tuple(each)})))
    assert found["exact", "CLIP-I"] != found["fast", "CLIP-I"]


class Counting(Engine):
    """Counts what is really drawn."""

    drawn = 0

    def run_batch(self, requests, **options):
        self.drawn += len(requests)
        return super().run_batch(requests, **options)


def test_an_interrupted_evaluation_goes_on_where_it_was(settings, tmp_path):
    config = EvaluateConfig(**settings | {"output": tmp_path / "out"})
    engine = Counting()
    first = evaluate(config, engine=engine)
    assert engine.drawn == 3 * 2 * 3  # pictures, samples, tasks; the front's scale 1 is the contender's own
    files = sorted((tmp_path / "out" / "drawings").iterdir())
    files[0].unlink()
    files[1].write_bytes(b"half")
    again = evaluate(config, engine=engine)
    assert engine.drawn == 3 * 2 * 3 + 2
    # Drawn in a batch or alone, a picture is the same but for the order of its sums.
    assert means(again) == pytest.approx(means(first), abs=1e-3)
    Image.new("RGB", (40, 32)).save(tmp_path / "shown" / "1.png")
    evaluate(config, engine=engine)
    assert engine.drawn > 3 * 2 * 3 + 2


def test_a_report_states_what_it_takes_to_repeat_it_and_no_drawing_is_made_twice(settings, shown):
    engine = Counting()
    report = evaluate(EvaluateConfig(**settings), engine=engine)  # nothing is kept in a folder
    assert engine.drawn == 3 * 2 * 3  # the front's scale 1 is the contender's own
    assert json.loads(to_json(report))["settings"].items() >= {
        "source": str(shown), "prompts": None, "only": None, "base": settings["base"], "samples": 2,
        "steps": 2, "guidance": None, "seed": 0,
    }.items()  # fmt: skip


def test_two_files_of_one_name_are_both_kept(tuned_base, tmp_path):
    source = next((tmp_path.parent / tuned_base["adapter"]).glob("*.safetensors"))
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(shutil.copy(source, tmp_path / name / "mine.safetensors"))
    config = EvaluateConfig(contenders=tuple(Contender(adapter=str(file)) for file in files))
    assert [name for name, _ in config.named(None)] == ["a/mine", "b/mine"]


def test_an_adapter_that_is_called_as_the_base_is_not_measured_in_its_place():
    config = EvaluateConfig(contenders=(Contender(adapter="a", label=BARE),))
    assert [name for name, _ in config.named(None)] == [f"{BARE} (2)"]


def test_records_that_are_left_out_are_counted(settings, shown):
    lines = [json.dumps({"file_name": "0.png", "text": "a cat"})] + ["{"] * 7
    (shown / "metadata.jsonl").write_text("\n".join(lines))
    config = EvaluateConfig(**settings)
    _, notes = read_cases(config, find_base(config.base))
    assert sum(note.startswith("metadata.jsonl:") for note in notes) == 5
    assert "and 2 more records are left out" in notes


def test_pictures_without_a_face_are_counted_where_identity_is_measured(settings, shown, tmp_path):
    for file in shown.glob("*.png"):
        photo(size=(512, 512), colour=50).save(file)
    face_model = str(pack(tmp_path / "pack"))
    report = evaluate(EvaluateConfig(**settings | {"face_model": face_model, "samples": 1}))
    assert "face identity" not in report.by_case["one"]
    assert "face identity is not measured on pictures in which no face was found (3)" in report.notes


def test_a_text_encoder_whose_settings_are_damaged_is_one_line(settings, tuned_base, tmp_path):
    base = shutil.copytree(tuned_base["base"], tmp_path / "damaged")
    (base / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json': not valid JSON"):
        evaluate(EvaluateConfig(**settings | {"base": str(base)}))


@pytest.mark.parametrize(("content", "says"), [(None, "there is no adapter"), (b"torn", "truncated")])
def test_an_adapter_that_cannot_be_read_is_refused_before_anything_is_drawn(
    settings, tmp_path, content, says
):
    file = tmp_path / "second.safetensors"
    if content:
        file.write_bytes(content)
    second = Contender(adapter=str(file))
    drawn = tmp_path / "drawn"
    config = EvaluateConfig(
        **settings | {"contenders": (*settings["contenders"], second), "output": str(drawn)}
    )
    with pytest.raises(ModelError, match=says):
        evaluate(config)
    assert not (drawn / "drawings").exists()


def test_pictures_without_captions_are_measured_by_what_needs_none(settings, shown):
    for file in shown.glob("*.txt"):
        file.unlink()
    report = evaluate(EvaluateConfig(**settings))
    assert list(report.by_case) == ["one"]
    assert set(report.by_case["one"]) == {"CLIP-I", "copy", "diversity"}
    assert not report.front
    assert "no captions: only drawings from the picture alone" in table(report)
    assert "no CLIP-T: it needs a caption for each picture" in table(report)
    assert "the picture alone" in html(report)


def test_pictures_without_captions_are_drawn_with_the_texts_of_a_file(settings, shown, tmp_path):
    for file in shown.glob("*.txt"):
        file.unlink()
    (tmp_path / "texts.txt").write_text("a dog\n")
    report = evaluate(EvaluateConfig(**settings | {"prompts": tmp_path / "texts.txt", "samples": 1}))
    assert {"both CLIP-I", "both text kept"} <= set(report.by_case["one"])


def test_texts_may_come_from_a_file(settings, tmp_path):
    (tmp_path / "texts.txt").write_text("a dog\n\nan owl\n", encoding="utf-8-sig")
    report = evaluate(EvaluateConfig(**settings | {"prompts": tmp_path / "texts.txt", "samples": 1}))
    assert [case.text for case in report.cases] == ["a dog", "an owl", "a dog"]
    assert [case.caption for case in report.cases] == ["a cat 0", "a cat 1", "a cat 2"]
    (tmp_path / "texts.txt").write_text("\n")
    with pytest.raises(InputError, match="no text"):
        evaluate(EvaluateConfig(**settings | {"prompts": tmp_path / "texts.txt"}))


def test_the_command_writes_table_json_and_one_page(settings, tuned_base, tmp_path, capsys):
    words = ["evaluate", settings["source"], "--base", tuned_base["base"], "--adapter", tuned_base["adapter"]]
    words += ["-n", "2", "--samples", "1", "--steps", "1", "--scales", "0.5,1", "-q"]
    (tmp_path / "out").mkdir()
    for name in ("out/report.html", "out/report.json", "f.json"):
        (tmp_path / name).write_text("mine")
        assert main([*words, "-o", str(tmp_path / "out"), "--json", str(tmp_path / "f.json")]) == 4
        assert f"{name}': imprompt did not make the file" in capsys.readouterr().err
        (tmp_path / name).unlink()
    for _ in range(2):  # its own report is replaced
        assert main([*words, "-o", str(tmp_path / "out"), "--json", str(tmp_path / "f.json")]) == 0
    assert "CLIP-I" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == 1 + 2 * 3  # the plot; of each picture itself, alone and with text
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert page.count("<svg") == len(figures)
    assert "http" not in page.replace("http-equiv", "")
    stored = json.loads((tmp_path / "f.json").read_text())
    assert stored["settings"]["pictures"] == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-n", "-1"], "n: .* greater than or equal to 1"), (["--steps", "0"], "steps"),
        (["--guidance", "nan"], "guidance"), (["--scales", "1,inf"], "scales"),
        (["--samples", "x"], "samples"),
        (["--adapter", "emoji,scale"], "field=value"), (["--adapter", "emoji,scal=1"], "scal"),
        (["--device", "cpux"], "cpux"), (["--base", "emojy"], "did you mean"),
        (["--json", "/proc/none/x.json"], "cannot write"), (["--json", "/"], "folder"),
        (["--prompts", __file__, "--json", __file__, "--overwrite"], "is read in this run"),
        (["-o", "no", "--json", "no/report.html"], "where the page goes"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_one_line_before_anything_is_drawn(words, says, capsys):
    assert main(["evaluate", "-q", "--steps", "1", "-n", "1", *words]) in (2, 3, 4)
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert re.search(says, error)


ONE = b'{"concept":"a","style":"b","split":"val","captions":%s}'


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b'{"cell": 3}', b'{"cell":9,"columns":1,"pictures":[{}]}',
     b'{"cell":9,"columns":0,"pictures":[1]}',
     b'{"cell":9,"columns":1,"pictures":[%s]}' % (ONE % b'7'),
     b'{"cell":9,"columns":1,"pictures":[%s]}' % (ONE % b'{"full":[1]}')],
)  # fmt: skip
def test_a_damaged_set_is_one_line(damage, tmp_path, capsys):
    (tmp_path / "eval.json").write_bytes(damage)
    Image.new("RGB", (9, 9)).save(tmp_path / "sheet.webp")
    assert main(["evaluate", str(tmp_path)]) == 4
    assert "is damaged" in capsys.readouterr().err


# ---- figures against what they must be


def drawing(x, colour="black", size=64):
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).polygon([(x, 8), (x + 24, 30), (x + 4, 50)], fill=colour)
    return image


def test_a_copy_is_1_even_cut_out_mirrored_or_tinted_and_another_picture_is_far_from_it():
    reference = drawing(8)
    assert copy_score(reference, reference) == pytest.approx(1)
    assert copy_score(reference.transpose(Image.Transpose.FLIP_LEFT_RIGHT), reference) == pytest.approx(1)
    assert copy_score(reference.crop((0, 0, 48, 48)).resize((64, 64)), reference) > 0.95
    assert copy_score(drawing(8, "grey"), reference) == pytest.approx(1)
    assert copy_score(tiny.picture(3, (64, 64)), tiny.picture(4, (64, 64))) < 0.9
    assert copy_score(Image.new("RGB", (8, 8)), reference) == 0


def test_diversity_is_0_for_one_drawing_repeated_and_1_for_unrelated_ones():
    assert diversity(torch.ones(3, 4)) == pytest.approx(0)
    assert diversity(torch.eye(3)) == pytest.approx(1)
    with pytest.raises(ValueError, match="two"):
        diversity(torch.ones(1, 4))


def test_a_paired_difference_finds_what_separate_intervals_hide():
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0))
    first, second = noise + 0.1, noise
    assert paired(first, second).low > 0
    assert bootstrap(first).low < bootstrap(second).high
    with pytest.raises(ValueError, match="pairs"):
        paired(first, second[1:])


def test_one_value_has_no_interval():
    one = bootstrap(torch.tensor([0.5]))
    assert (one.mean, one.low, one.high, one.n) == (0.5, None, None, 1)
    assert "[" not in str(one)


def test_a_scorer_of_texts_is_believed_only_if_it_tells_captions_apart():
    captions = [f"caption {number}" for number in range(8)]
    images = torch.eye(8)
    knowing = Scorer("knows", lambda some: images, lambda some: torch.eye(8))
    guessing = Scorer("guesses", lambda some: images, lambda some: torch.ones(8, 8))
    assert tells_texts(knowing, images, captions)
    assert not tells_texts(guessing, images, captions)
    assert not tells_texts(Scorer("blind", lambda some: images), images, captions)


def test_contenders_are_read_from_words():
    each = Contender.parse("a/b.safetensors,scale=0.5,profile=style")
    assert (each.adapter, each.scale, each.profile) == ("a/b.safetensors", 0.5, "style")
    assert each.name == "b scale 0.5 style"
    assert Contender.parse("a/b.safetensors,speed=fast").name == "b fast"
    with pytest.raises(UsageError, match="scale"):
        Contender.parse(f"a,scale={math.nan}")
    with pytest.raises(UsageError, match="did you mean 'layout'"):
        Contender.parse("a,profile=layot")
