"""What is saved is whole, carries its request, and takes nothing from anybody."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imprompt import output
from imprompt.encoders.images import load_frames
from imprompt.encoders.video import read_video
from imprompt.errors import InputError, UsageError
from imprompt.schema.request import Request


@dataclass
class Drawn:
    """As much of a result as saving needs."""

    images: list[Image.Image]
    request: Request
    provenance: dict[str, str] = field(default_factory=lambda: {"imprompt": "0"})
    maps: tuple[object, ...] = ()


def noise(seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def still(seed: int = 1, count: int = 1, **fields: object) -> Drawn:
    request = Request(prompt="an owl", seed=seed, count=count, steps=2, size=(64, 48), **fields)
    return Drawn([noise(seed + i) for i in range(count)], request)


def clip(seed: int = 1, frames: int = 3, count: int = 1) -> Drawn:
    request = Request(task="animate", prompt="an owl", seed=seed, count=count, frames=frames, fps=8.0)
    return Drawn([noise(seed + i) for i in range(frames * count)], request)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_new_clip_of_which_a_page_cannot_be_written_is_not_left_behind(tmp_path: Path) -> None:
    name = "x" * 250  # the page's would be too long
    with pytest.raises(InputError, match="too long"):
        output.save(clip(), tmp_path / name, numbered=True, pages={"grid": noise()})
    assert list(tmp_path.iterdir()) == []


STILLS = (".png", ".jpg", ".jpeg", ".webp")
CLIPS = (".gif", ".webp", ".mp4", "")


def few_colours(drawn: Drawn) -> Drawn:
    """The same in 216 colours: a GIF is as large, and its palette is found in a tenth of the time."""
    drawn.images = [image.point(lambda value: value // 43 * 51) for image in drawn.images]
    return drawn


def drawn_for(suffix: str, *, moving: bool, seed: int = 1) -> Drawn:
    if not moving:
        return still(seed)
    return few_colours(clip(seed)) if suffix == ".gif" else clip(seed)


FORMATS = [(suffix, False) for suffix in STILLS] + [(suffix, True) for suffix in CLIPS]
each_format = pytest.mark.parametrize(("suffix", "moving"), FORMATS)


@each_format
def test_every_format_carries_the_request(tmp_path: Path, suffix: str, moving: bool) -> None:
    drawn = drawn_for(suffix, moving=moving)
    (path,) = output.save(drawn, tmp_path / f"a{suffix}")
    record = output.read_record(path)
    assert record.request == drawn.request
    assert record.provenance == drawn.provenance
    assert {file.name for file in tmp_path.iterdir()} == {f"a{suffix}"}


@each_format
def test_several_are_numbered_and_each_has_its_own_request(tmp_path: Path, suffix: str, moving: bool) -> None:
    drawn = few_colours(clip(count=2)) if moving else still(count=2)
    paths = output.save(drawn, tmp_path / f"a{suffix}")
    assert [path.name for path in paths] == [f"a-1{suffix}", f"a-2{suffix}"]
    assert [output.read_request(path).seed for path in paths] == [1, 2]
    assert {output.read_request(path).count for path in paths} == {1}


@each_format
def test_our_own_file_is_replaced_and_anything_else_only_when_asked(
    tmp_path: Path, suffix: str, moving: bool
) -> None:
    place = tmp_path / f"a{suffix}"
    output.save(drawn_for(suffix, moving=moving), place)
    output.save(drawn_for(suffix, moving=moving, seed=7), place)
    assert output.read_request(place).seed == 7
    if not suffix:
        return
    photo = tmp_path / f"photo{suffix}"
    photo.write_bytes(b"my only copy")
    for call in (output.save, lambda drawn, place: output.check_target(place, drawn.request)):
        with pytest.raises(InputError, match=r"did not make.*--overwrite"):
            call(drawn_for(suffix, moving=moving), photo)
    assert photo.read_bytes() == b"my only copy"
    output.save(drawn_for(suffix, moving=moving), photo, overwrite=True)
    assert output.read_request(photo).seed == 1


def test_a_photo_of_the_same_format_is_not_replaced(tmp_path: Path) -> None:
    for suffix in STILLS:
        photo = tmp_path / f"photo{suffix}"
        noise(5).save(photo)
        before = photo.read_bytes()
        with pytest.raises(InputError, match="--overwrite"):
            output.save(still(), photo)
        with pytest.raises(InputError, match="--overwrite"):
            output.save_page(noise(), tmp_path / "photo.png")
        assert photo.read_bytes() == before


def test_pages_maps_and_json_of_ours_are_replaced_and_others_are_not(tmp_path: Path) -> None:
    control = {"kind": "none", "path": "a.png", "model": "m"}
    drawn = still(controls=[control])
    drawn.maps = (noise(3),)
    for seed in (1, 2):
        drawn.request = drawn.request.replace(seed=seed)
        paths = output.save(drawn, tmp_path / "a.png", maps=True, pages={"where-1": noise(seed)})
        output.save_together({tmp_path / "a.json": {"seed": seed}, tmp_path / "b.png": noise(seed)})
    assert [path.name for path in paths] == ["a.png", "a-control-1-none.png", "a-where-1.png"]
    for path in paths[1:]:
        with pytest.raises(InputError, match=r"page of pictures, or .* carries no request; the pictures"):
            output.read_record(path)
    assert json.loads((tmp_path / "a.json").read_text())["seed"] == 2
    (tmp_path / "c.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="--overwrite"):
        output.save_together({tmp_path / "new.png": still(), tmp_path / "c.json": {}})
    assert not (tmp_path / "new.png").exists()
    (tmp_path / "d-where-1.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="--overwrite"):
        output.save(drawn, tmp_path / "d.png", pages={"where-1": noise()})
    assert not (tmp_path / "d.png").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("target", "asked"),
    {
        "start.png": {"image": "./start.png"},
        "../work/start.png": {"image": "start.png"},
        "link.png": {"image": "start.png"},
        "other.png": {"image": "link.png"},
        "a.png": {"image": "a-2.png", "count": 2},
        "mask.png": {"image": "start.png", "images": [{"image": "a.png", "mask": "mask.png"}]},
        "moved.gif": {"task": "animate", "video": "moved.gif", "prompt": "a"},
        "frames": {"task": "animate", "images": [{"image": "frames", "at": "each"}]},
        "frames/": {"task": "animate", "images": ["frames/0002.png"]},
        "frames/0001.png": {"images": ["start.png"], "image": "frames/0001.png"},
    }.items(),
)  # fmt: skip
def test_what_a_request_reads_is_never_replaced_by_what_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, asked: dict[str, object], overwrite: bool
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("start.png", "a.png", "a-2.png", "mask.png"):
        output.save(still(), name)  # imprompt's own, which are replaced where nothing reads them
    for name in ("frames", "moved.gif"):
        output.save(clip(), name)
    Path("link.png").symlink_to("start.png")
    Path("other.png").hardlink_to("start.png")
    before = {path: path.read_bytes() for path in Path().glob("**/*.*")}
    request = Request.from_mapping({"task": "edit", "seed": 1, "strength": None, **asked})
    if request.task == "animate":
        request = request.replace(frames=3, fps=8)
    drawn = Drawn([noise(9) for _ in range(request.count * (request.frames or 1))], request)
    with pytest.raises(InputError, match="is read in this run"):
        output.check_target(target, request, overwrite=overwrite)
    with pytest.raises(InputError, match="is read in this run"):
        output.save(drawn, target, overwrite=overwrite)
    assert {path: path.read_bytes() for path in Path().glob("**/*.*")} == before


def test_maps_and_pages_replace_no_picture_that_is_read(tmp_path: Path) -> None:
    places = [tmp_path / "a-control-1-none.png", tmp_path / "a-grid.png"]
    for place in places:
        output.save(still(), place)
        control = {"kind": "none", "path": str(place), "model": "m"}
        drawn = still(controls=[control])
        drawn.maps = (noise(3),)
        with pytest.raises(InputError, match="is read in this run"):
            output.check_target(tmp_path / "a.png", drawn.request, maps=True, pages=["grid"])
        with pytest.raises(InputError, match="is read in this run"):
            output.save(drawn, tmp_path / "a.png", maps=True, pages={"grid": noise()})
    assert sorted(tmp_path.iterdir()) == places
    # a free name is chosen anyway, so that nothing is in the way
    output.check_target(tmp_path / "a.png", drawn.request, maps=True, pages=["grid"], numbered=True)


@each_format
def test_links_are_never_followed(tmp_path: Path, suffix: str, moving: bool) -> None:
    real = tmp_path / f"real{suffix}"
    output.save(drawn_for(suffix, moving=moving), real)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    link = tmp_path / f"link{suffix}"
    link.symlink_to(real)
    with pytest.raises(InputError):
        output.save(drawn_for(suffix, moving=moving, seed=7), link)
    assert link.is_symlink()
    if suffix:
        output.save(drawn_for(suffix, moving=moving, seed=7), link, overwrite=True)
        assert not link.is_symlink()
    assert {path: path.read_bytes() for path in before} == before


def test_a_file_put_among_frames_while_they_are_replaced_stays(tmp_path: Path) -> None:
    (path,) = output.save(clip(), tmp_path / "frames")
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        folder = Path(sys.argv[1])
        number = 0
        print("ready", flush=True)
        end = time.monotonic() + float(sys.argv[2])
        while time.monotonic() < end:
            try:
                (folder / f"mine{number}.txt").write_text(str(number))
                number += 1
            except FileNotFoundError:
                pass
            time.sleep(0.01)
        print(number)
        """
    )
    with subprocess.Popen([sys.executable, "-c", script, path, "1.5"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        while child.poll() is None:
            try:
                output.save(clip(), path)
            except InputError:  # it holds a file of others by now
                break
        written = int(child.stdout.read())
    kept = {file.read_text() for file in tmp_path.rglob("mine*.txt")}
    assert written > 0
    assert kept == {str(number) for number in range(written)}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing fails behind ``size`` bytes, after a short write: what a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@each_format
def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path, suffix: str, moving: bool) -> None:
    place = tmp_path / f"a{suffix}"
    output.save(drawn_for(suffix, moving=moving), place)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    new = drawn_for(suffix, moving=moving, seed=7)
    refused, messages, largest = 0, set(), max(map(len, before.values()))
    for size in range(0, largest + 8192, 4096):
        with file_size_limit(size):
            try:
                output.save(new, place)
                break
            except InputError as error:
                messages.add(str(error))
                refused += 1
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert {path.name for path in tmp_path.iterdir()} == {place.name}
    assert refused >= largest // 4096 - 1
    assert all("cannot write" in message for message in messages)
    assert output.read_request(place).seed == 7


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", folder], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@each_format
def test_a_really_full_disk_leaves_the_old_file(small_disk: Path, suffix: str, moving: bool) -> None:
    place = small_disk / f"a{suffix}"
    output.save(drawn_for(suffix, moving=moving), place)
    before = files(small_disk)
    taken = 0
    while True:  # fill it in steps of 4 kB
        try:
            (small_disk / f"filling{taken}").write_bytes(bytes(4096))
            taken += 1
        except OSError:
            (small_disk / f"filling{taken}").unlink(missing_ok=True)
            break
    refused, messages = 0, set()
    for number in range(taken + 1):
        try:
            output.save(drawn_for(suffix, moving=moving, seed=7), place)
            break
        except InputError as error:
            messages.add(str(error))
            refused += 1
            assert output.read_request(place).seed == 1
            (small_disk / f"filling{number}").unlink()
    assert refused > 0
    assert all("No space left" in message for message in messages)
    assert output.read_request(place).seed == 7
    assert [name for name in files(small_disk) if not name.startswith("filling")] == before


SAVER = textwrap.dedent(
    """
    import signal, sys
    from pathlib import Path
    from test_save import clip, still
    from imprompt import output
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    suffix, moving, number, folder = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3]), Path(sys.argv[4])
    drawn = clip(number, frames=6) if moving else still(number)
    if sys.argv[6] == "same" and suffix != ".gif":  # large enough to be interrupted
        drawn.images = [image.resize((320, 240)) for image in drawn.images]
    print("ready", flush=True)
    try:
        sys.stdin.readline()
        for _ in range(int(sys.argv[5])):
            output.save(drawn, folder / f"a{suffix}", numbered=sys.argv[6] == "numbered")
    except KeyboardInterrupt:
        sys.exit(130)
    """
)


def saver(suffix: str, moving: bool, number: int, folder: Path, times: int, how: str) -> "subprocess.Popen":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    child = subprocess.Popen(
        [sys.executable, "-c", SAVER, suffix, str(moving), str(number), folder, str(times), how],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    return child


def start(child: "subprocess.Popen") -> None:
    assert child.stdin is not None
    child.stdin.write(b"go\n")
    child.stdin.flush()


@pytest.mark.parametrize(("suffix", "moving"), [(".png", False), ("", True)])  # a file and a folder
def test_two_processes_that_choose_names_lose_nothing(tmp_path: Path, suffix: str, moving: bool) -> None:
    children = [saver(suffix, moving, number, tmp_path, 4, "numbered") for number in (1, 2)]
    for child in children:
        start(child)
    for child in children:
        child.communicate(timeout=120)
        assert child.returncode == 0
    seeds = [output.read_request(path).seed for path in tmp_path.iterdir()]
    assert sorted(seeds) == [1] * 4 + [2] * 4  # type: ignore[type-var]


@pytest.mark.parametrize(("suffix", "moving"), [(".png", False), (".mp4", True), ("", True)])
def test_a_signal_inside_a_save_leaves_whole_files_only(tmp_path: Path, suffix: str, moving: bool) -> None:
    place = tmp_path / f"a{suffix}"
    output.save(clip(9) if moving else still(9), place)
    for wait in (0.02, 0.09):
        child = saver(suffix, moving, 2, tmp_path, 1000, "same")
        start(child)
        time.sleep(wait)
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)
        assert child.returncode == 130
        assert output.read_request(place).seed in (9, 2)
        if suffix == "":
            assert len(load_frames(place)[0]) in (3, 6)
        elif suffix == ".mp4":
            assert len(read_video(place)[0]) in (3, 6)
        else:
            load_frames(place)
        assert {path.name for path in tmp_path.iterdir()} == {place.name}


def test_a_target_is_checked_before_drawing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "x.png").mkdir()
    for name, error in {
        "a.txt": UsageError, "a": UsageError, "file/a.png": InputError, "x.png": InputError,
        "a\0.png": InputError, "~nouser/a.png": InputError, "x" * 300 + ".png": InputError,
        "\ud800.png": InputError,
    }.items():  # fmt: skip
        for path in (str(tmp_path / name), name):
            if (error is InputError and name.startswith(("file", "x."))) and path == name:
                continue
            if name.startswith("~") and path != name:
                continue
            with pytest.raises(error):
                output.check_target(path, Request(prompt="a"))
    assert output.check_target(tmp_path / "new" / "a.png", Request(prompt="a")) == tmp_path / "new" / "a.png"
    fast = clip()
    fast.request = fast.request.replace(fps=60)
    with pytest.raises(UsageError, match="at most 50 frames per second, not 60"):
        output.save(fast, tmp_path / "a.gif")
    with pytest.raises(UsageError, match="at most 50 frames per second, not 60"):
        output.check_target(tmp_path / "a.gif", fast.request)


def test_texts_that_a_format_cannot_hold_are_refused(tmp_path: Path) -> None:
    long = still()
    long.request = Request(prompt="x" * 20_000, regions=[
        {"text": "y" * 20_000, "mask": f"{i}.png"} for i in range(3)
    ], seed=1)  # fmt: skip
    with pytest.raises(InputError, match=r"a\.jpg.*\.png holds more"):
        output.save(long, tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())
    (path,) = output.save(long, tmp_path / "a.png")
    assert output.read_request(path) == long.request


def test_odd_sizes_are_refused_by_mp4(tmp_path: Path) -> None:
    odd = clip()
    odd.images = [image.resize((63, 48)) for image in odd.images]
    with pytest.raises(InputError, match="even width"):
        output.save(odd, tmp_path / "a.mp4")


def test_names_of_a_servers_models_are_kept_whatever_files_are_called_like_them(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("anime").mkdir()
    drawn = still()
    drawn.request = drawn.request.replace(base="anime")
    output.save(drawn, Path("out/kept.png"), keep_names=True)
    output.save(drawn, Path("out/local.png"))
    with Image.open("out/kept.png") as kept, Image.open("out/local.png") as local:
        assert json.loads(kept.text["imprompt"])["request"]["base"] == "anime"
        assert json.loads(local.text["imprompt"])["request"]["base"] == "../anime"
