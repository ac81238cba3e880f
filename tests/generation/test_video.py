"""Clips drawn on tiny real models: what the task animate does, from pictures to files and back."""

import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNetMotionModel
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

import tiny
from controls import saved, tiny_controlnet, tiny_sparse, tiny_union
from facemodels import pack, photo
from faces import face_state
from imprompt import output
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.errors import AdapterMismatch, InputError, ModelError, UsageError
from imprompt.generation.engine import Engine, generate
from imprompt.output.clips import encode_clip
from imprompt.schema.prompt import ImagePrompt, TextRegion
from imprompt.schema.request import FPS, ControlRef, Request

FRAMES = 4


@pytest.fixture(scope="module")
def motion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("motion")
    tiny.tiny_motion().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A GIF of six frames, twelve a second."""
    path = tmp_path_factory.mktemp("film") / "film.gif"
    frames = [tiny.picture(20 + i, (40, 40)) for i in range(6)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[80, 90, 80, 80, 90, 80], loop=0)
    return path


@pytest.fixture(scope="module")
def asked(base, motion):
    def ask(**fields):
        adapter = {"adapter": str(base / "adapters")} if "images" in fields else {}
        common = {
            "prompt": "a cat",
            "base": str(base),
            "motion": motion,
            "frames": FRAMES,
            "steps": 2,
            "seed": 5,
        }
        return Request(**{"task": "animate", **common, **adapter, **fields})

    return ask


def pixels(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


def test_a_clip_is_repeated_from_its_file_and_clip_number_i_is_the_first_of_seed_plus_i(
    engine, asked, pictures, tmp_path
):
    result = engine.run(asked(images=[pictures / "ref.png"], count=2))
    assert len(result.images) == 2 * FRAMES
    assert (result.request.frames, result.request.fps, result.request.shared_noise) == (FRAMES, 8, 0)
    first, second = output.save(result, tmp_path / "cat.webp")
    again = engine.run(output.read_request(second))
    assert np.array_equal(pixels(again.images), pixels(result.images[FRAMES:]))
    assert output.read_request(first).seed == 5


def test_frames_differ_and_stills_are_drawn_as_before_a_clip(engine, asked, common, pictures):
    still = Request(prompt="a cat", images=[pictures / "ref.png"], **common)
    before = pixels(engine.run(still).images)
    clip = pixels(engine.run(asked(images=[pictures / "ref.png"])).images)
    assert all(np.abs(a - b).max() > 2 for a, b in pairwise(clip))
    assert np.array_equal(pixels(engine.run(still).images), before)


def test_more_shared_noise_brings_frames_closer_and_all_of_it_makes_them_alike(engine, asked):
    def spread(part):
        clip = pixels(engine.run(asked(shared_noise=part)).images)
        return np.abs(clip - clip.mean(0)).mean()

    none, half, most = spread(0), spread(0.5), spread(0.95)
    assert none > half > most


def test_noise_that_is_shared_to_the_end_is_shared_noise_of_1(engine, asked):
    """No step lies behind a start of 0.9999."""
    to_the_end = engine.run(asked(shared_start=0.9999, shared_noise=0.2))
    assert np.array_equal(pixels(to_the_end.images), pixels(engine.run(asked(shared_noise=1)).images))
    assert to_the_end.request.shared_start == 0.9999


@contextmanager
def unet_inputs():
    """The latents (B, C, F, h, w) and timestep of every call of a video UNet."""
    seen = []

    def note(module, args):
        if isinstance(module, UNetMotionModel):
            seen.append((args[0].clone(), float(args[1])))

    hook = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


# LCM gives each frame new noise of its own at every step.
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "pndm", "euler", "euler-a", "dpm++2m", "unipc"])
def test_a_shared_start_ends_in_noise_of_each_frames_own_at_the_level_of_its_step(engine, asked, scheduler):
    with unet_inputs() as seen:
        clip = engine.run(asked(shared_start=0.3, shared_noise=0.25, steps=6, scheduler=scheduler))
    differing = [(latents - latents.mean(2, keepdim=True))[:1] for latents, _ in seen]
    own = [t <= 700 for _, t in seen]
    assert not own[0]
    assert not differing[0].any()
    first = next(number for number, far in enumerate(differing) if far.std() > 0.3)
    assert own[first]
    assert not any(own[:first]) or scheduler == "pndm"  # whose first step takes two calls
    # The rest of the variance is common, and nearly so what frames show: the motion adapter is untrained.
    alpha_bar = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod
    level = float(1 - alpha_bar[int(seen[first][1])])
    expected = (0.75 * level * (1 - 1 / FRAMES)) ** 0.5
    assert float(differing[first].std()) == pytest.approx(expected, rel=0.15)
    assert np.ptp(pixels(clip.images), axis=0).any()


def test_a_video_that_begins_behind_the_shared_start_is_drawn_as_without(engine, asked, film):
    redrawn = asked(video=film, frames=4, steps=6, strength=0.5, shared_noise=0.5)
    plain = pixels(engine.run(redrawn).images)
    behind = engine.run(redrawn.replace(shared_start=0.2))
    assert np.array_equal(pixels(behind.images), plain)
    assert any("shared_start 0.2 has no effect: drawing begins at 0.67" in note for note in behind.notes)
    assert not np.array_equal(pixels(engine.run(redrawn.replace(shared_start=0.8)).images), plain)


def idle(result):
    return [note for note in result.notes if "has no effect" in note]


@pytest.mark.filterwarnings("ignore:the face models")
def test_the_frame_that_shows_no_face_to_a_face_adapter_is_named(asked, tmp_path):
    state = face_state(tiny.tiny_sd().unet, "faceid", rank=None)
    IPAdapter.from_state_dict(state, variant="faceid").save_pretrained(tmp_path, "faceid.safetensors")
    (tmp_path / "film").mkdir()
    for number, spots in enumerate([(160, 320, "red")] * 3 + [None]):
        photo(*([spots] if spots else [])).save(tmp_path / "film" / f"{number}.png")
    models = pack(tmp_path / "buffalo_l")
    each = ImagePrompt(str(tmp_path / "film"), at="each", adapter=str(tmp_path / "faceid.safetensors"))
    shown = asked(images=[each], face_model=models, adapter=None)
    with pytest.raises(InputError, match=r"no face was found in '.*film, frame 3'"):
        Engine().run(shown)


def test_windows_that_are_no_shorter_than_the_clip_are_said(engine, asked):
    drawn = engine.run(asked(context=4))
    (note,) = idle(drawn)
    assert "context 4 has no effect: the clip's 4 frames are drawn in one window" in note
    plain = engine.run(asked())
    assert np.array_equal(pixels(drawn.images), pixels(plain.images)), "and it is true"
    assert idle(plain) == idle(engine.run(plain.request)) == []
    assert idle(engine.run(asked(context=4, frames=6))) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"noise_path": "loop", "shared_noise": 1}, ["noise_path loop .*: with shared_noise 1 frames"]),
        ({"noise_path": "loop", "shared_noise": 0.9}, []),
        (
            {"noise_path": "loop", "shared_noise": 0.5, "shared_start": 0.9999},
            ["shared_noise 0.5 .*: all 2 steps lie before shared_start 0.9999", "noise_path loop .*"],
        ),
        ({"shared_start": 0.9999}, []),
    ],
)
def test_noise_of_each_frame_that_has_no_share_is_said(engine, asked, fields, said):
    drawn = engine.run(asked(**fields))
    notes = idle(drawn)
    assert len(notes) == len(said)
    assert all(re.search(wanted, note) for wanted, note in zip(said, notes, strict=True))
    if said:  # and it is true
        alike = engine.run(asked(shared_noise=1))
        assert np.array_equal(pixels(drawn.images), pixels(alike.images))


def test_a_note_says_which_values_are_the_motion_adapters(engine, asked, motion, tmp_path):
    """Nobody who asked for one step only has said where noise is shared."""
    shutil.copytree(motion, tmp_path / "calm")
    known = {"shared_start": 0.13, "shared_noise": 0.97, "noise_path": "loop"}
    (tmp_path / "calm" / "imprompt.json").write_text(json.dumps(known))
    calm = {"motion": str(tmp_path / "calm"), "steps": 4}
    (note,) = idle(engine.run(asked(**calm)))
    assert "shared_start 0.13 (the motion adapter's) has no effect: drawing begins at 0.25" in note
    (note,) = idle(engine.run(asked(**calm, shared_start=0.2)))
    assert "shared_start 0.2 has no effect" in note
    assert idle(engine.run(asked(**calm, shared_start=0, shared_noise=1))) == []


def test_a_folder_of_frames_is_redrawn_at_the_rate_of_its_record(engine, asked, tmp_path):
    (frames,) = output.save(engine.run(asked(fps=12)), tmp_path / "frames")
    again = engine.run(asked(video=frames, frames=None))
    assert (again.request.fps, again.request.frames) == (12, FRAMES)
    slower = engine.run(asked(video=frames, frames=None, fps=6))
    assert (slower.request.fps, slower.request.frames) == (6, FRAMES // 2)
    for frame in frames.iterdir():
        Image.open(frame).convert("RGB").save(frame)  # without its record
    assert engine.run(asked(video=frames, frames=None)).request.fps == 8


def test_noise_on_a_loop_moves_little_by_little_and_ends_where_it_began(engine, asked):
    def steps(path):
        clip = pixels(engine.run(asked(noise_path=path, frames=8)).images)
        return [np.abs(clip[i] - clip[i - 1]).mean() for i in range(len(clip))]  # the first after the last

    apart, loop = steps("apart"), steps("loop")
    assert max(loop) < min(apart)
    assert max(loop) < 2 * min(loop)


def test_key_pictures_stand_at_their_frames(engine, asked, pictures):
    names = [str(pictures / "ref.png"), str(pictures / "other.png")]
    keys = ImagePrompt(names, at=(0, FRAMES - 1), scale=1)
    result = engine.run(asked(images=[keys]))
    one = engine.run(asked(images=[ImagePrompt(names[0], scale=1)]))
    assert not np.array_equal(pixels(result.images)[-1], pixels(one.images)[-1])


def test_the_place_of_a_single_picture_is_said_to_do_nothing(engine, asked, pictures):
    placed = engine.run(asked(images=[ImagePrompt(pictures / "ref.png", at=2)]))
    assert [note.partition(":")[0] for note in idle(placed)] == ["images.0.at has no effect"]
    plain = engine.run(asked(images=[ImagePrompt(pictures / "ref.png")]))
    assert np.array_equal(pixels(placed.images), pixels(plain.images))
    assert idle(plain) == []


def test_a_folder_and_an_animated_picture_show_one_picture_a_frame(engine, asked, film, tmp_path):
    with Image.open(film) as moving:
        for number in range(FRAMES):
            moving.seek(number)
            moving.convert("RGB").save(tmp_path / f"{number}.png")
    by_folder = engine.run(asked(images=[ImagePrompt(str(tmp_path), at="each")]))
    keys = ImagePrompt([tmp_path / f"{i}.png" for i in range(FRAMES)], at=range(FRAMES))
    by_keys = engine.run(asked(images=[keys]))
    assert np.array_equal(pixels(by_folder.images), pixels(by_keys.images))
    six = engine.run(asked(images=[ImagePrompt(str(film), at="each")], frames=6))
    assert len(six.images) == 6


def test_a_mask_may_move(engine, asked, pictures, tmp_path):
    for number in range(FRAMES):
        mask = Image.new("L", (16, 16))
        mask.paste(255, (4 * number, 0, 4 * number + 4, 16))
        mask.save(tmp_path / f"{number}.png")
    ref = ImagePrompt(str(pictures / "ref.png"), mask=str(tmp_path), scale=1)
    moving = engine.run(asked(images=[ref]))
    still = engine.run(asked(images=[ref.replace(mask=str(tmp_path / "0.png"))]))
    assert not np.array_equal(pixels(moving.images)[-1], pixels(still.images)[-1])
    text = TextRegion(text="a dog", mask=str(tmp_path))
    moving = engine.run(asked(regions=[text]))
    still = engine.run(asked(regions=[text.replace(mask=str(tmp_path / "0.png"))]))
    assert not np.array_equal(pixels(moving.images)[-1], pixels(still.images)[-1])
    with pytest.raises(InputError, match=f"{FRAMES} masks, the clip has 6"):
        engine.run(asked(regions=[text], frames=6))


def test_a_video_is_redrawn_at_its_pace_or_at_the_asked_one(engine, asked, film):
    own = engine.run(asked(video=film, frames=None, strength=0.5))
    assert (own.request.frames, own.request.fps, own.images[0].size) == (6, 12, (32, 32))
    slow = engine.run(asked(video=film, frames=None, fps=6, strength=0.5))
    assert slow.request.frames == 3
    fast = engine.run(asked(video=film, frames=None, fps=24, strength=0.5))
    assert fast.request.frames == 12  # to its end, each frame twice
    shared = engine.run(asked(video=film, frames=4, shared_noise=0.5, strength=0.5))
    assert len(shared.images) == 4


@pytest.mark.parametrize(
    ("count", "rate", "fields", "said"),
    [
        (6, 120, {}, "has 120 frames per second, a clip has 0.01 to 60; .*--fps"),
        (2, Fraction(1, 200), {}, "has 0.005 frames per second"),
        (1, 8, {}, "at 8 frames per second a clip of all of it has 1, and 2 to 512 can be drawn"),
        (6, 0.5, {"fps": 60}, "at 60 frames per second a clip of all of it has 720"),
    ],
)
def test_a_video_that_no_clip_can_be_as_a_whole_is_said_with_what_to_do(
    engine, asked, tmp_path, count, rate, fields, said
):
    path = tmp_path / "a.mp4"
    path.write_bytes(encode_clip([tiny.picture(i, (40, 40)) for i in range(count)], ".mp4", rate, "{}"))
    request = asked(video=path, frames=None, strength=0.5, **fields)
    with pytest.raises(InputError, match=said):
        engine.run(request)
    if count > 1:
        assert len(engine.run(request.replace(frames=2, fps=30)).images) == 2, "and that helps"


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return saved(tiny_controlnet(), tmp_path_factory.mktemp("net"))


@pytest.fixture(scope="module")
def followed(engine, asked, net, film):
    """A clip of six frames that follows a film."""
    return engine.run(asked(frames=6, controls=[ControlRef(kind="none", path=film, model=net)]))


def test_a_clip_follows_a_picture_or_one_a_frame_and_is_repeated_from_its_file(
    engine, asked, pictures, net, tmp_path
):
    one = ControlRef(kind="none", path=pictures / "ref.png", model=net)
    alone = pixels(engine.run(asked()).images)
    followed = engine.run(asked(controls=[one]))
    silent = engine.run(asked(controls=[one.replace(scale=0)]))
    assert np.abs(pixels(followed.images) - alone).max() > 2
    assert np.array_equal(pixels(silent.images), alone)
    assert np.array_equal(pixels(engine.run(asked()).images), alone)

    (tmp_path / "same").mkdir()
    (tmp_path / "other").mkdir()
    for number in range(FRAMES):
        with Image.open(pictures / "ref.png") as image:
            image.save(tmp_path / "same" / f"{number}.png")
        tiny.picture(20 + number, (40, 40)).save(tmp_path / "other" / f"{number}.png")
    same = engine.run(asked(controls=[one.replace(path=str(tmp_path / "same"))]))
    assert np.array_equal(pixels(same.images), pixels(followed.images))
    moving = one.replace(path=str(tmp_path / "other"))
    prompted = engine.run(asked(controls=[moving], images=[pictures / "ref.png"]))
    assert [frame.size for frame in prompted.maps[0]] == [(32, 32)] * FRAMES
    assert prompted.provenance["controls"].startswith(net)
    (path,) = output.save(prompted, tmp_path / "clip.webp")
    again = output.read_request(path)
    assert again.controls == (moving.replace(favor="balanced"),)
    assert np.array_equal(pixels(engine.run(again).images), pixels(prompted.images))
    _, maps = output.save(prompted, path, maps=True)
    assert (maps.name, len(list(maps.iterdir()))) == ("clip-control-1-none", FRAMES)
    mapped = engine.run(again.replace(controls=[one.replace(path=str(maps))], hashes={}))
    assert np.array_equal(pixels(mapped.images), pixels(prompted.images))


def test_a_video_is_redrawn_along_itself(engine, asked, film, net):
    ref = ControlRef(kind="none", path=film, model=net)
    redrawn = asked(video=film, frames=3, strength=0.5)
    followed = engine.run(redrawn.replace(controls=[ref]))
    assert len(followed.images) == len(followed.maps[0]) == 3
    assert np.abs(pixels(followed.images) - pixels(engine.run(redrawn).images)).max() > 2
    shared = engine.run(redrawn.replace(controls=[ref], shared_noise=0.5))
    assert len(shared.images) == 3


def test_a_long_clip_follows_its_control_in_windows(engine, asked, pictures, net):
    ref = ControlRef(kind="none", path=pictures / "ref.png", model=net)
    assert len(engine.run(asked(frames=11, controls=[ref])).images) == 11


def test_controls_that_no_clip_can_follow_are_said_in_one_line(engine, asked, pictures, film, net, tmp_path):
    ref = ControlRef(kind="none", path=film, model=net)
    with pytest.raises(InputError, match="6 control pictures, the clip has 4 frames"):
        engine.run(asked(controls=[ref]))
    union = saved(tiny_union(), tmp_path / "union")
    with pytest.raises(UsageError, match="ControlNet-Union, which diffusers takes for stills"):
        engine.run(asked(controls=[ref.replace(model=f"{union}:canny")]))
    tiny.tiny_sdxl().save_pretrained(tmp_path / "xl")
    sparse = saved(tiny_sparse(), tmp_path / "sparse")
    key = ControlRef(kind="frame", path=pictures / "ref.png", at=0, model=sparse)
    with pytest.raises(UsageError, match="SDXL model, for which diffusers has no SparseCtrl"):
        engine.run(asked(base=str(tmp_path / "xl"), controls=[key]))


def test_an_sdxl_clip_follows_its_control_and_the_next_ones_do_not(asked, pictures, tmp_path):
    tiny.tiny_sdxl().save_pretrained(tmp_path / "xl")
    ref = ControlRef(
        kind="none", path=pictures / "ref.png", model=saved(tiny_controlnet("sdxl"), tmp_path / "net")
    )
    engine, plain = Engine(), asked(base=str(tmp_path / "xl"))
    alone = pixels(engine.run(plain).images)
    followed = pixels(engine.run(plain.replace(controls=[ref])).images)
    assert np.abs(followed - alone).max() > 2
    assert np.array_equal(pixels(engine.run(plain).images), alone)
    silent = plain.replace(controls=[ref.replace(scale=0)])
    assert np.array_equal(pixels(engine.run(silent).images), alone)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return saved(tiny_sparse(), tmp_path_factory.mktemp("sparse"))


def test_pictures_stand_at_frames_of_a_clip_which_is_repeated_from_its_file(
    engine, asked, pictures, film, sparse, tmp_path
):
    first = ControlRef(kind="frame", path=pictures / "ref.png", at=0, model=sparse)
    last = first.replace(path=str(film), at=FRAMES - 1)
    alone = pixels(engine.run(asked()).images)
    silent = [ref.replace(scale=0) for ref in (first, last)]
    assert np.array_equal(pixels(engine.run(asked(controls=silent)).images), alone)
    clip = engine.run(asked(controls=[first, last], images=[pictures / "other.png"]))
    drawn = pixels(clip.images)
    assert any("film.gif' is animated; its first frame" in note for note in clip.notes)
    for other in ({"controls": [first]}, {"controls": [last]}, {"scale": 0}):
        assert not np.array_equal(pixels(engine.run(clip.request.replace(**other)).images), drawn)
    (path,) = output.save(clip, tmp_path / "clip.webp")
    again = output.read_request(path)
    assert again.controls == tuple(ref.replace(favor="balanced") for ref in (first, last))
    before = torch.random.get_rng_state()
    assert np.array_equal(pixels(engine.run(again).images), drawn)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(pixels(engine.run(asked()).images), alone)


KEYS = [
    ({"at": None, "kind": "tile"}, {}, "is a SparseCtrl; say the frame"),
    ({"at": 4}, {}, "at=4 lies after the last of 4 frames"),
    ({"end": 0.5}, {}, "acts from the first step to the last"),
    ({}, {"video": "<film>", "frames": None}, "clips that start from no video"),
    ({}, {"frames": 9, "context": 8}, "tells 8 frames apart, not 9"),
    ({"model": "<net>"}, {}, "at=0 needs a SparseCtrl, and .* is a ControlNet, which is followed in every"),
    ({"model": None}, {}, "has no default SparseCtrl, which at needs, for frame"),
    ({}, {"base": "emoji", "motion": None}, "another kind|SparseCtrl for"),
]


@pytest.mark.parametrize(("ref", "fields", "message"), KEYS)
def test_a_picture_at_a_frame_that_cannot_be_followed_is_said_in_one_line(
    engine, asked, pictures, film, sparse, net, ref, fields, message
):
    places = {"<film>": str(film), "<net>": net}
    ref, fields = ({k: places.get(v, v) for k, v in each.items()} for each in (ref, fields))
    key = ControlRef(**{"kind": "frame", "path": pictures / "ref.png", "at": 0, "model": sparse, **ref})
    with pytest.raises((UsageError, ModelError), match=message) as said:
        engine.run(asked(controls=[key], **fields))
    assert "\n" not in str(said.value)


def test_two_pictures_at_one_frame_or_of_two_kinds_of_model_are_refused(asked, engine, pictures, sparse, net):
    key = ControlRef(kind="frame", path=pictures / "ref.png", at=0, model=sparse)
    with pytest.raises(UsageError, match="two have the same `at`"):
        engine.run(asked(controls=[key, key.replace(path=str(pictures / "other.png"))]))
    with pytest.raises(UsageError, match="one scale for all"):
        engine.run(asked(controls=[key, key.replace(at=1, scale=0.5)]))
    with pytest.raises(UsageError, match=r"a SparseCtrl, '.*' a ControlNet; several"):
        engine.run(asked(controls=[key, ControlRef(kind="none", path=pictures / "ref.png", model=net)]))


def test_a_long_clip_is_drawn_in_windows_and_leaves_the_pipeline_as_it_was(engine, asked):
    short = pixels(engine.run(asked()).images)
    long = engine.run(asked(frames=11))
    assert len(long.images) == 11
    assert long.request.context == 8
    assert np.array_equal(pixels(engine.run(asked()).images), short)


def test_after_windows_the_same_blocks_draw_as_before(asked):
    """Others would not be packed, and round otherwise."""

    def blocks(**fields):
        called = []
        hook = register_module_forward_pre_hook(lambda module, _: called.append(module))
        try:
            engine.run(asked(**fields))
        finally:
            hook.remove()
        return {module for module in called if type(module) is BasicTransformerBlock}

    engine = Engine()
    before = blocks()
    assert before
    assert blocks(frames=11) != before
    assert blocks() == before


@pytest.mark.parametrize(
    "fields",
    [
        {"images": ["<film>"]},
        {"images": [{"image": "ref.png", "mask": "<film>"}]},
        {"images": [{"image": "ref.png", "negative": "<film>"}]},
        {"images": ["ref.png"], "task": "edit", "image": "<film>"},
        {"images": ["ref.png"], "task": "inpaint", "image": "ref.png", "mask": "<film>"},
    ],
)
def test_an_animated_picture_as_a_still_is_its_first_frame_with_a_note(
    engine, film, pictures, common, fields
):
    result = engine.run(Request(prompt="a", **places(fields, film, pictures), **common))
    assert [note for note in result.notes if "animated" in note and "its first frame is taken" in note]


def places(value, film, pictures):
    """``value`` with the pictures it names as files."""
    if isinstance(value, dict):
        return {name: places(each, film, pictures) for name, each in value.items()}
    if isinstance(value, list):
        return [places(each, film, pictures) for each in value]
    known = {"<film>": film, "<folder>": film.parent, "ref.png": pictures / "ref.png"}
    return str(known[value]) if isinstance(value, str) and value in known else value


@pytest.fixture(scope="module")
def clip(engine, asked):
    return engine.run(asked(fps=7))


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4", ""])
def test_every_format_keeps_frames_pace_and_request(clip, tmp_path, suffix):
    from imprompt.encoders.video import read_clip

    (path,) = output.save(clip, tmp_path / f"clip{suffix}")
    assert output.read_request(path) == clip.request.single(0)
    frames, fps = read_clip(path, "clip")
    assert len(frames) == FRAMES
    assert fps is None if suffix == "" else abs(fps - 7) < 0.2
    worst = {"": 0, ".webp": 0, ".gif": 12, ".mp4": 30}[suffix]
    assert np.abs(pixels(frames) - pixels(clip.images)).mean() <= worst
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4"])
@pytest.mark.parametrize("fps", FPS)
def test_every_format_holds_the_slowest_and_the_fastest_clip(clip, tmp_path, suffix, fps):
    from imprompt.encoders.video import read_clip

    paced = replace(clip, request=clip.request.replace(fps=fps))
    if suffix == ".gif" and fps > 50:
        with pytest.raises(UsageError, match="a GIF shows at most 50"):
            output.save(paced, tmp_path / "clip.gif")
        return
    (path,) = output.save(paced, tmp_path / f"clip{suffix}")
    assert read_clip(path, "clip")[1] == pytest.approx(fps, rel=0.01)
    with pytest.raises(UsageError, match="fps"):
        clip.request.replace(fps=fps / 2 if fps < 1 else 2 * fps)


def test_a_gif_lasts_as_long_as_it_should(engine, asked, tmp_path):
    result = engine.run(asked(fps=7, frames=7))
    (path,) = output.save(result, tmp_path / "clip.gif")
    with Image.open(path) as image:
        total = 0
        for number in range(image.n_frames):
            image.seek(number)
            total += image.info["duration"]
    assert total == 1000


def test_a_folder_of_our_frames_is_replaced_whole_as_a_file_is(followed, tmp_path):
    path, maps = output.save(followed, tmp_path / "clip", maps=True)
    shorter = followed.request.replace(frames=4, seed=6)
    second = replace(followed, images=followed.images[:4], request=shorter, maps=(followed.maps[0][:4],))
    assert output.save(second, path, maps=True) == [path, maps]
    for folder in (path, maps):
        assert sorted(file.name for file in folder.iterdir()) == [f"{i:04}.png" for i in (1, 2, 3, 4)]
    assert output.read_request(path).seed == 6
    assert {file.name for file in tmp_path.iterdir()} == {path.name, maps.name}


@pytest.mark.parametrize("inside", [[], ["notes.txt"], ["0001.png"], ["0001.png", "notes.txt"]])
def test_a_folder_of_anything_else_is_never_replaced(followed, tmp_path, inside):
    folders = tmp_path / "clip", tmp_path / "clip-control-1-none"
    for folder in folders:
        folder.mkdir()
        for name in inside:
            (folder / name).touch() if name == "notes.txt" else tiny.picture(1).save(folder / name)
    for refused in (
        lambda: output.check_target(folders[0], followed.request),
        lambda: output.check_target(tmp_path / "clip.gif", followed.request, maps=True),
        lambda: output.save(followed, folders[0]),
        lambda: output.save(followed, tmp_path / "clip.gif", maps=True),
        lambda: output.save(followed, folders[0], overwrite=True),
    ):
        with pytest.raises(InputError, match=r"folder of other things.*Give another name"):
            refused()
    assert all(sorted(file.name for file in folder.iterdir()) == inside for folder in folders)
    assert len(list(tmp_path.iterdir())) == 2


def test_frames_do_not_replace_a_file(tmp_path):
    (tmp_path / "clip").touch()
    with pytest.raises(InputError, match="it is a file"):
        output.check_target(tmp_path / "clip", Request(task="animate", prompt="a"))


def test_a_motion_adapter_of_another_base_is_refused_and_nothing_changes(asked, tmp_path):
    tiny.tiny_motion(width=32).save_pretrained(tmp_path)
    engine = Engine()
    with pytest.raises(AdapterMismatch, match=r"widths \(32, 64\).*\(16, 32\)"):
        engine.run(asked(motion=str(tmp_path)))
    engine.run(asked())


REFUSED = [
    (InputError, "is a still", {"video": "ref.png"}),
    (InputError, "is a still", {"images": [{"image": "ref.png", "at": "each"}]}),
    (InputError, "6 pictures, the clip has 4 frames", {"images": [{"image": "<film>", "at": "each"}]}),
    (InputError, "6 masks, the clip has 4", {"images": [{"image": "ref.png", "mask": "<film>"}]}),
    (InputError, "6 frames at 12 per second, not 9", {"video": "<film>", "frames": 9}),
    (UsageError, "tells 8 frames apart, not 16", {"frames": 20, "context": 16}),
    (UsageError, "drawn in windows", {"frames": 12, "context": 8, "prompt": "a (cat:1.3)"}),
    (ModelError, "no motion adapter at", {"motion": "./no/such/folder"}),
    (UsageError, "did you mean animatediff", {"motion": "animatedif"}),
    (UsageError, "no default motion adapter", {"motion": None}),
    (AdapterMismatch, "'animatediff' is for sd15.*'emoji'", {"base": "emoji", "motion": "animatediff"}),
    (InputError, "is a folder; a picture is expected", {"images": ["<folder>"]}),
]


def test_a_video_shown_as_a_still_is_said_to_be_one(engine, asked, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(encode_clip([tiny.picture(i, (40, 40)) for i in range(FRAMES)], ".mp4", 8, "{}"))
    with pytest.raises(InputError, match=r"a\.mp4' is a video, and a picture is expected; .*at=each"):
        engine.run(asked(images=[path]))
    engine.run(asked(images=[ImagePrompt(path, at="each")]))


@pytest.mark.parametrize(("kind", "message", "fields"), REFUSED)
def test_what_cannot_move_is_said_in_one_line(engine, asked, pictures, film, kind, message, fields):
    with pytest.raises(kind, match=message) as said:
        engine.run(asked(**places(fields, film, pictures)))
    assert "\n" not in str(said.value)


CONTRADICTIONS = [
    ({"task": "generate", "frames": 8}, "frames: has no effect in the task 'generate'"),
    ({"task": "generate", "images": [{"image": "a", "at": 3}]}, "at and frame_curve"),
    ({"task": "animate", "strength": 0.5}, "strength: has no effect without a video"),
    ({"task": "animate", "images": [{"image": ["a", "b"], "at": [3]}]}, "1 frames are given for 2 pictures"),
    (
        {"task": "animate", "images": [{"image": ["a", "b"], "at": [3, 3]}]},
        "larger than the one before it",
    ),
    (
        {"task": "animate", "frames": 4, "images": [{"image": "a", "at": 4}]},
        "after the last of 4 frames",
    ),
    ({"task": "animate", "image": "a"}, "image: has no effect in the task 'animate'"),
    ({"task": "animate", "images": [{"image": "a", "at": "all"}]}, "at"),
    ({"task": "generate", "controls": [{"kind": "frame", "path": "a", "at": 0}]}, "controls: at has no"),
    (
        {"task": "animate", "controls": [{"kind": "frame", "path": "a"}]},
        "needs its place in the clip",
    ),
]


@pytest.mark.parametrize(("fields", "message"), CONTRADICTIONS)
def test_a_request_says_what_would_have_no_effect(fields, message):
    with pytest.raises(UsageError, match=message):
        Request(prompt="a", **fields)


def test_the_seeds_set_up_is_a_scheduler_by_name(base):
    from diffusers import DDIMScheduler

    from imprompt.generation.pipelines import scheduler_for

    made = scheduler_for(tiny.tiny_sd(), "ddim-linear")
    assert isinstance(made, DDIMScheduler)
    said = {
        name: made.config[name]
        for name in ("clip_sample", "timestep_spacing", "beta_schedule", "steps_offset")
    }
    assert said == {
        "clip_sample": False, "timestep_spacing": "linspace", "beta_schedule": "linear", "steps_offset": 1,
    }  # fmt: skip


def test_sdxl_moves_and_says_what_it_cannot(tmp_path, motion, pictures, film):
    pipe = tiny.tiny_sdxl()
    pipe.save_pretrained(tmp_path / "xl")
    asked = Request(
        task="animate", prompt="a cat", base=str(tmp_path / "xl"), motion=motion, frames=4, steps=2
    )
    assert len(generate(asked).images) == 4
    with pytest.raises(UsageError, match="no sliding windows"):
        generate(asked.replace(frames=9))
    with pytest.raises(UsageError, match="cannot start from a video"):
        generate(asked.replace(video=str(film)))


def test_in_sdxls_clips_regions_and_a_shared_start_act(tmp_path, motion, pictures):
    """Its pipeline counts videos where others count pictures, and asks its scheduler for tuples."""
    tiny.tiny_sdxl().save_pretrained(tmp_path / "xl")
    engine, plain = Engine(), {"prompt": "a cat", "base": str(tmp_path / "xl"), "motion": motion, "frames": 2}
    asked = Request(task="animate", steps=4, seed=1, **plain)
    alone = pixels(engine.run(asked).images)
    region = TextRegion("a dog", str(pictures / "mask.png"))
    assert not np.array_equal(pixels(engine.run(asked.replace(regions=(region,))).images), alone)
    late = pixels(engine.run(asked.replace(shared_start=0.4)).images)
    calm = pixels(engine.run(asked.replace(shared_noise=1)).images)
    assert np.abs(calm[0] - calm[1]).max() <= 1
    assert np.abs(late[0] - late[1]).max() > 1


def test_a_sweep_of_clips_writes_a_file_each_and_a_page(engine, asked, tmp_path):
    from imprompt.app.sweep import sweep

    results, paths = sweep(asked(prompt="a"), ["seed=1,2"], tmp_path / "s.gif", engine=engine)
    assert [path.name for path in paths] == ["s-1.gif", "s-2.gif", "s-grid.png"]
    assert [result.request.seed for result in results] == [1, 2]
    assert output.read_request(paths[1]).seed == 2


def test_in_a_clip_too_the_image_has_guidance_of_its_own(engine, asked, pictures):
    def drawn(**fields):
        images = [{"image": pictures / "ref.png", "scale": 1}]
        return pixels(engine.run(asked(images=images, guidance=4, **fields)).images)

    ordinary = drawn()
    assert np.abs(drawn(image_guidance=4) - ordinary).max() <= 1
    assert np.abs(drawn(image_guidance=12) - ordinary).max() > 2


def test_in_a_clip_too_a_region_says_its_own_text(engine, asked, pictures):
    def drawn(**fields):
        where = {"image": pictures / "ref.png", "scale": 0, "mask": pictures / "mask.png", **fields}
        return pixels(engine.run(asked(images=[where])).images)

    assert np.abs(drawn(text="a dog") - drawn()).max() > 2
