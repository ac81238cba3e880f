"""`imprompt batch`: results by id, resumed, sharded, and failures that stop nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from imprompt.app.batch import read_jobs, read_shard
from imprompt.app.cli import main
from imprompt.errors import UsageError
from imprompt.output import read_request

Jobs = Callable[..., Path]


@pytest.fixture
def jobs(tmp_path: Path, place: Path) -> Jobs:
    """Writes a file of lines as they are, and of requests on the tiny base."""

    def write(*lines: object) -> Path:
        path, base = tmp_path / "jobs.jsonl", str(place / "base")
        texts = [
            json.dumps({"base": base, **line}) if isinstance(line, dict) else str(line) for line in lines
        ]
        path.write_text("".join(text + "\n" for text in texts))
        return path

    return write


def manifest(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_draws_lists_failures_and_goes_on_where_it_stopped(jobs: Jobs, tmp_path: Path, capsys) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    owl = {"id": "owl", "prompt": "an owl", "images": ["red.png"], "steps": 2, "seed": 1}
    cat = {"prompt": "a cat", "steps": 2, "seed": 2}
    file = jobs(owl, "not json", {"id": "gone", "images": ["no.png"], "steps": 2}, cat)
    out = tmp_path / "drawn"
    assert main(["batch", str(file), "-o", str(out)]) == 1
    assert read_request(out / "owl.png").prompt == "an owl"
    assert read_request(out / "000004.png").seed == 2
    assert {entry["id"]: entry["state"] for entry in manifest(out)} == {
        "owl": "done", "000002": "failed", "gone": "failed", "000004": "done",
    }  # fmt: skip
    told = capsys.readouterr().err
    assert "no.png" in told
    assert "2 drawn, 2 failed" in told

    drawn = (out / "owl.png").stat().st_mtime_ns
    (out / "000004.png").unlink()
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "no.png")
    assert main(["batch", str(file), "-o", str(out)]) == 1  # the line that is no JSON
    assert (out / "owl.png").stat().st_mtime_ns == drawn
    assert (out / "000004.png").exists()
    assert (out / "gone.png").exists()

    jobs({**owl, "seed": 7})
    assert main(["batch", str(file), "-o", str(out)]) == 0
    assert read_request(out / "owl.png").seed == 7


def test_odd_lines_are_listed_and_the_others_are_read(jobs: Jobs, tmp_path: Path) -> None:
    odd = [
        {"prompt": "a", "images": [{"path": "a.png"}, {"image": "b.png"}]},
        {"images": [{"path": "a.png"}], "guidance": "strong"},
        {"images": [{"image": "a.png", "curve": [[0, 10**400]]}]},
        {"images": [{"image": "a.png", "profile": '{"a":' * 3000 + "1" + "}" * 3000}]},
    ]
    read = list(read_jobs(jobs(*odd, {"prompt": "a cat"})))
    assert [job.request is None for job in read] == [True, True, True, True, False]
    assert all(job.error for job in read[:-1])


def test_a_format_that_cannot_be_written_is_said_before_a_model_is_looked_for(
    jobs: Jobs, tmp_path: Path, capsys
) -> None:
    file = jobs({"prompt": "a cat", "base": "no/where"})
    assert main(["batch", str(file), "-o", str(tmp_path / "drawn"), "--format", "tiff"]) == 2
    assert "--format 'tiff': png, jpg, jpeg, webp, gif, mp4 are known." in capsys.readouterr().err


def test_a_batch_draws_as_each_alone(jobs: Jobs, tmp_path: Path) -> None:
    lines = [{"prompt": prompt, "steps": 2, "seed": 5} for prompt in ("a cat", "an owl")]
    file = jobs(*lines)
    for size in ("1", "8"):
        assert main(["batch", str(file), "-o", str(tmp_path / size), "--batch", size]) == 0
    for name in ("000001.png", "000002.png"):
        one, other = (Image.open(tmp_path / size / name).convert("RGB").tobytes() for size in ("1", "8"))
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 2


def test_shards_draw_every_job_once(jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = jobs(*({"prompt": "a cat", "steps": 1, "seed": seed} for seed in range(3)))
    out = tmp_path / "drawn"
    assert main(["batch", str(file), "-o", str(out), "--shard", "1/2"]) == 0
    assert sorted(path.name for path in out.glob("*.png")) == ["000001.png", "000003.png"]
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert main(["batch", str(file), "-o", str(out), "--shard", "auto"]) == 0
    assert len(list(out.glob("*.png"))) == 3
    assert len(list(out.glob("manifest-*-of-2.jsonl"))) == 2


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_wrong_shards_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--shard"):
        read_shard(text)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([{"id": "a", "prompt": "x"}, {"id": "A", "prompt": "y"}], "twice"),
    ],
)
def test_ids_that_would_share_a_file_are_refused(
    jobs: Jobs, tmp_path: Path, capsys, lines: list, text: str
) -> None:
    assert main(["batch", str(jobs(*lines)), "-o", str(tmp_path / "out")]) == 2
    assert text in capsys.readouterr().err


def test_an_id_that_leaves_the_folder_fails_alone(jobs: Jobs, tmp_path: Path) -> None:
    file = jobs({"id": "../evil", "prompt": "x"}, {"id": "good", "prompt": "a cat", "steps": 1})
    assert main(["batch", str(file), "-o", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "evil.png").exists()
    assert (tmp_path / "out" / "good.png").exists()


def test_an_output_that_is_a_file_is_refused(jobs: Jobs, tmp_path: Path, capsys) -> None:
    file = jobs({"prompt": "a cat"})
    assert main(["batch", str(file), "-o", str(file)]) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize("files", [None, 5, ["gone.png"]])
def test_a_manifest_that_names_no_files_is_drawn_again(jobs: Jobs, tmp_path: Path, files: object) -> None:
    file, out = jobs({"prompt": "a cat", "steps": 1, "size": [64, 64]}), tmp_path / "out"
    assert main(["batch", str(file), "-o", str(out)]) == 0
    entry = {**manifest(out)[0], "files": files}
    (out / "manifest.jsonl").write_text(json.dumps(entry) + "\n")
    assert main(["batch", str(file), "-o", str(out)]) == 0
    assert manifest(out)[-1]["files"] == ["000001.png"]


def test_another_format_is_drawn_and_each_stays_known(jobs: Jobs, tmp_path: Path, capsys) -> None:
    file, out = jobs({"prompt": "a cat", "steps": 1, "size": [64, 64]}), tmp_path / "out"
    for form, said in (("png", "1 drawn"), ("jpg", "1 drawn"), ("png", "0 drawn"), ("jpg", "0 drawn")):
        assert main(["batch", str(file), "-o", str(out), "--format", form]) == 0
        assert said in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"000001.png", "000001.jpg", "manifest.jsonl"}


def test_a_request_that_was_changed_and_changed_back_is_drawn_each_time(jobs: Jobs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for seed in (1, 2, 1):
        cat = {"id": "cat", "prompt": "a cat", "steps": 1, "size": [64, 64], "seed": seed}
        assert main(["batch", str(jobs(cat)), "-o", str(out)]) == 0
        assert read_request(out / "cat.png").seed == seed


def test_a_file_of_jobs_that_is_called_as_the_manifest_stays(tmp_path: Path, capsys) -> None:
    before = json.dumps({"id": "cat", "prompt": "a cat", "base": "no/where"}) + "\n"
    (tmp_path / "manifest.jsonl").write_text(before)
    assert main(["batch", str(tmp_path / "manifest.jsonl"), "-o", str(tmp_path)]) == 4
    assert "is no manifest of a batch" in capsys.readouterr().err
    assert (tmp_path / "manifest.jsonl").read_text() == before


def test_half_a_line_at_the_end_of_a_manifest_swallows_no_other(jobs: Jobs, tmp_path: Path, capsys) -> None:
    file, out = jobs({"prompt": "a cat", "steps": 1, "size": [64, 64]}), tmp_path / "out"
    out.mkdir()
    (out / "manifest.jsonl").write_text('{"id": "000001", "dig')
    for said in ("1 drawn", "0 drawn"):
        assert main(["batch", str(file), "-o", str(out)]) == 0
        assert said in capsys.readouterr().err


def test_no_job_replaces_what_another_reads_and_a_users_file_only_when_asked(
    jobs: Jobs, tmp_path: Path, capsys
) -> None:
    for name in ("star.png", "moon.png", "sun.png"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    before = (tmp_path / "moon.png").read_bytes()
    star = {"id": "star", "prompt": "a star", "images": ["./moon.png"], "steps": 1, "size": [64, 64]}
    file = jobs(star, {**star, "id": "moon", "images": ["star.png"]}, {**star, "id": "sun"})
    assert main(["batch", str(file), "-o", str(tmp_path), "--overwrite"]) == 1
    told = capsys.readouterr().err
    assert told.count("is read in this run") == 2
    assert (tmp_path / "moon.png").read_bytes() == (tmp_path / "star.png").read_bytes() == before
    assert read_request(tmp_path / "sun.png").prompt == "a star"


def test_a_job_that_reads_what_another_draws_waits_for_the_next_run(
    jobs: Jobs, tmp_path: Path, capsys
) -> None:
    star = {"id": "star", "prompt": "a star", "steps": 1, "size": [64, 64], "seed": 1}
    like = {**star, "id": "like", "images": ["out/star.png"]}
    out = tmp_path / "out"

    def draw(*lines: dict, more: tuple[str, ...] = ()) -> tuple[int, str]:
        file = jobs(*lines)
        return main(["batch", str(file), "-o", str(out), *more]), capsys.readouterr().err

    code, told = draw(star, like)
    assert code == 1
    assert "like: 'out/star.png' is drawn in this run, by job 'star', and jobs are drawn in any order" in told
    assert "1 drawn, 1 failed" in told
    code, told = draw(star, like)
    assert code == 0
    assert "1 of 2 are drawn already" in told
    assert read_request(out / "like.png").prompt == "a star"

    before = (out / "star.png").read_bytes()
    code, told = draw({**star, "seed": 2}, like, more=("--overwrite",))  # what like was drawn from stays
    assert code == 1
    assert "star.png': what is there is read in this run" in told
    assert (out / "star.png").read_bytes() == before

    (out / "star.png").unlink()
    (out / "like.png").unlink()
    assert draw({**like, "id": "other"}, {**star, "seed": 2}, more=("--shard", "1/2"))[0] == 1
    assert not (out / "other.png").exists()  # which the other part draws


@pytest.mark.parametrize(("rank", "size"), [("5", "2"), ("2", "2"), ("one", "2"), ("0", "0"), ("-1", "2")])
def test_ranks_that_are_no_part_are_refused(rank: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UsageError, match="--shard auto: RANK"):
        read_shard("auto")


def test_a_users_own_file_of_the_same_name_stays(jobs: Jobs, tmp_path: Path, capsys) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    file = jobs({"id": "photo", "prompt": "a cat", "images": ["photo.png"], "steps": 2})
    assert main(["batch", str(file), "-o", str(tmp_path)]) == 1
    assert (tmp_path / "photo.png").read_bytes() == before
    assert "imprompt did not make the file that is there" in capsys.readouterr().err


def test_jobs_that_would_write_one_file_are_refused(jobs: Jobs, tmp_path: Path, capsys) -> None:
    file = jobs({"id": "owl", "prompt": "an owl", "count": 2}, {"id": "Owl-1", "prompt": "a cat"})
    assert main(["batch", str(file), "-o", str(tmp_path / "drawn")]) == 2
    assert "'Owl-1' and 'owl' would both write" in capsys.readouterr().err
