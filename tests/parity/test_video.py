"""Our clips equal diffusers' own IP-Adapter path on the same weights: text to video, video to video, and what
diffusers does by hand for one picture a frame."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffControlNetPipeline,
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AnimateDiffSparseControlNetPipeline,
    AnimateDiffVideoToVideoControlNetPipeline,
    AnimateDiffVideoToVideoPipeline,
    UNetMotionModel,
)
from torch.utils._python_dispatch import TorchDispatchMode

from controls import saved, tiny_controlnet, tiny_sparse
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.catalog.resolve import Source
from imprompt.generation.control import control_call, controlled, find_controls, load_net
from imprompt.generation.families import Base
from imprompt.generation.video import Motion, motion_pipeline
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import ControlRef, Request
from tiny import picture, random_adapter_state, tiny_encoder, tiny_motion, tiny_sd, tiny_sdxl

FRAMES = 3
PIPELINES = {
    ("sd", "text"): AnimateDiffPipeline,
    ("sd", "video"): AnimateDiffVideoToVideoPipeline,
    ("sdxl", "text"): AnimateDiffSDXLPipeline,
}


def pipeline(family: str, start: str):
    parts = {"sd": tiny_sd, "sdxl": tiny_sdxl}[family]().components
    motion = tiny_motion()
    model, processor = tiny_encoder()
    parts = {name: part for name, part in parts.items() if name != "safety_checker"}
    parts |= {"image_encoder": model, "feature_extractor": processor, "motion_adapter": motion}
    parts["unet"] = UNetMotionModel.from_unet2d(parts["unet"], motion).eval()
    pipe = PIPELINES[family, start](**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, guidance: float, **extra: object) -> np.ndarray:
    if "VideoToVideo" in type(pipe).__name__:
        extra |= {
            "video": [picture(60 + i) for i in range(FRAMES)],
            "strength": 0.7,
            "num_inference_steps": 3,
        }
    else:
        extra |= {"num_frames": FRAMES, "num_inference_steps": 2}
    frames = pipe(
        prompt="a cat", negative_prompt="bad", guidance_scale=guidance, width=32, height=32,
        generator=torch.Generator().manual_seed(5), output_type="np", **extra,
    ).frames  # fmt: skip
    return np.asarray(frames)


@pytest.mark.parametrize(("guidance", "kind"), [(5.0, "linear"), (1.0, "plus"), (5.0, "plus")])
@pytest.mark.parametrize(("family", "start"), list(PIPELINES))
def test_a_clip_is_what_diffusers_draws(family: str, start: str, kind: str, guidance: float) -> None:
    pipe = pipeline(family, start)
    state = random_adapter_state(pipe.unet, kind)
    without = draw(pipe, guidance)
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.set_prompt(picture(1), scale=0.6)
    ours = draw(pipe, guidance)
    adapter.detach()
    assert np.array_equal(draw(pipe, guidance), without)
    pipe.load_ip_adapter(state, subfolder=None, weight_name=None, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.6)
    theirs = draw(pipe, guidance, ip_adapter_image=picture(1))
    assert np.abs(ours - theirs).max() <= 1e-4
    assert np.abs(ours - without).max() > 1e-3, (
        "the picture would have no effect, and parity would say nothing"
    )


@pytest.mark.parametrize(("start", "nets"), [("text", 1), ("text", 2), ("video", 1), ("video", 2)])
def test_a_clip_with_controls_is_what_diffusers_draws(start: str, nets: int, tmp_path: Path) -> None:
    """Ours through ``controlled`` and ``control_call``; one control's picture moves, the other's stands."""
    pipe = pipeline("sd", start)
    moving, still = [picture(70 + i) for i in range(FRAMES)], picture(7)
    models = [saved(tiny_controlnet(seed=11 + i), tmp_path / str(i)) for i in range(nets)]
    refs = [
        ControlRef(kind="none", path=f"map {model}", model=model, scale=scale)
        for model, scale in zip(models, (0.8, 0.5), strict=False)
    ]
    redrawn = {"video": "film", "strength": 0.7} if start == "video" else {}
    request = Request(task="animate", prompt="a cat", frames=FRAMES, controls=refs, **redrawn)
    found = find_controls(request, Base("tiny", "tiny"))
    loaded = {control.source: load_net(control, torch.float32) for control in found}
    ours = controlled(pipe, "animate", found, loaded)
    call = control_call(found, [tuple(moving), still][:nets], request)
    state = random_adapter_state(pipe.unet)
    adapter = IPAdapter.from_state_dict(state).attach(ours)
    without = draw(ours, 5.0, **call)
    assert np.abs(without - draw(pipe, 5.0)).max() > 1e-3, "the controls would have no effect"

    seen: list[torch.Tensor] = []
    hooks = [
        net.register_forward_hook(
            lambda _, __, given, out: seen.append(
                torch.cat([given["encoder_hidden_states"].ravel(), out[0][0].ravel()])
            ),
            with_kwargs=True,
        )
        for net in loaded.values()
    ]
    draw(ours, 5.0, **call)
    first, seen[:] = seen[:nets], []
    adapter.set_prompt(picture(1), scale=0.6)
    drawn = draw(ours, 5.0, **call)
    assert all(map(torch.equal, first, seen[:nets])), "the picture reached a ControlNet"
    for hook in hooks:
        hook.remove()
    adapter.detach()

    kind = {"text": AnimateDiffControlNetPipeline, "video": AnimateDiffVideoToVideoControlNetPipeline}[start]
    made = [loaded[model] for model in models]
    theirs = kind(**pipe.components, controlnet=made[0] if nets == 1 else made)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_ip_adapter(state, subfolder=None, weight_name=None, image_encoder_folder=None)
    theirs.set_ip_adapter_scale(0.6)
    maps = [moving, [still] * FRAMES]
    expected = draw(
        theirs, 5.0, ip_adapter_image=picture(1), conditioning_frames=maps[0] if nets == 1 else maps,
        controlnet_conditioning_scale=0.8 if nets == 1 else [0.8, 0.5],
    )  # fmt: skip
    assert np.abs(drawn - expected).max() <= 1e-4
    assert np.abs(drawn - without).max() > 1e-3, "nor would the picture"


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize(("rgb", "places"), [(True, (0, 2)), (True, (1,)), (False, (2, 0))])
def test_pictures_at_frames_are_what_diffusers_draws(rgb, places, guidance, tmp_path: Path) -> None:
    """SparseCtrl, of pictures and of scribbles, beside an image prompt."""
    pipe = pipeline("sd", "text")
    model = saved(tiny_sparse(rgb=rgb), tmp_path)
    keys = [picture(80 + at) for at in places]
    refs = [ControlRef(kind="frame", path=str(at), at=at, model=model, scale=0.7) for at in places]
    request = Request(task="animate", prompt="a cat", frames=FRAMES, controls=refs)
    found = find_controls(request, Base("tiny", "tiny"))
    net = load_net(found[0], torch.float32)
    ours = controlled(pipe, "animate", found, {model: net})
    call = control_call(found, keys, request)
    state = random_adapter_state(pipe.unet)

    def drawn(moving, **more: object) -> np.ndarray:
        torch.manual_seed(3)  # diffusers encodes the pictures by torch's own randomness
        return draw(moving, guidance, **more)

    adapter = IPAdapter.from_state_dict(state).attach(ours)
    without = drawn(ours, **call)
    assert np.abs(without - drawn(pipe)).max() > 1e-3, "the pictures at frames would have no effect"
    adapter.set_prompt(picture(1), scale=0.6)
    both = drawn(ours, **call)
    adapter.detach()

    theirs = AnimateDiffSparseControlNetPipeline(**pipe.components, controlnet=net)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_ip_adapter(state, subfolder=None, weight_name=None, image_encoder_folder=None)
    theirs.set_ip_adapter_scale(0.6)
    expected = drawn(
        theirs, ip_adapter_image=picture(1), conditioning_frames=keys, controlnet_frame_indices=list(places),
        controlnet_conditioning_scale=0.7,
    )  # fmt: skip
    assert np.abs(both - expected).max() <= 1e-4
    assert np.abs(both - without).max() > 1e-3, "nor would the image prompt"


def still_motion():
    """A motion adapter that moves nothing: each frame is what the UNet alone makes of it."""
    motion = tiny_motion()
    with torch.no_grad():
        for name, parameter in motion.named_parameters():
            if ".proj_out." in name:
                parameter.zero_()
    return motion


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_where_nothing_moves_a_clips_frames_are_stills(family: str, tmp_path: Path) -> None:
    """Every weight of the base is in the UNet that moves; diffusers leaves SDXL's ``add_embedding`` out."""
    still = {"sd": tiny_sd, "sdxl": tiny_sdxl}[family]()
    still_motion().save_pretrained(tmp_path)
    pipe = motion_pipeline(still, Motion(Source("still", tmp_path)), Base("tiny", "tiny"), torch.float32)
    noise = torch.randn(1, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(2))
    frames = draw(pipe, 5.0, latents=noise)[0]
    for frame in range(FRAMES):
        expected = still(
            prompt="a cat", negative_prompt="bad", num_inference_steps=2, guidance_scale=5.0, width=32,
            height=32, latents=noise[:, :, frame], output_type="np",
        ).images[0]  # fmt: skip
        assert np.abs(frames[frame] - expected).max() <= 1e-4


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("nets", [1, 2])
def test_frames_of_an_sdxl_clip_follow_controls_as_diffusers_stills_do(nets, guidance, tmp_path) -> None:
    """diffusers has no pipeline of SDXL clips with ControlNets. Where nothing moves, ours must draw each
    frame as its pipeline of stills draws it from the same noise; with scale 0, as its clips without."""
    still = tiny_sdxl()
    still_motion().save_pretrained(tmp_path / "motion")
    pipe = motion_pipeline(
        still, Motion(Source("still", tmp_path / "motion")), Base("tiny", "tiny"), torch.float32
    )
    models = [saved(tiny_controlnet("sdxl", seed=11 + i), tmp_path / str(i)) for i in range(nets)]
    refs = [
        ControlRef(kind="none", path=model, model=model, scale=scale, end=end)
        for model, scale, end in zip(models, (0.8, 0.5), (0.7, 1.0), strict=False)
    ]
    request = Request(task="animate", prompt="a cat", frames=FRAMES, controls=refs)
    found = find_controls(request, Base("tiny", "tiny"))
    loaded = {control.source: load_net(control, torch.float32) for control in found}
    ours = controlled(pipe, "animate", found, loaded)
    maps = [tuple(picture(70 + i) for i in range(FRAMES)), picture(7)][:nets]
    call = control_call(found, maps, request)
    noise = torch.randn(1, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(2))

    drawn = draw(ours, guidance, latents=noise, **call)[0]
    assert not pipe.unet._forward_pre_hooks
    plain = draw(pipe, guidance, latents=noise)[0]
    assert np.abs(drawn - plain).max() > 1e-3, "the controls would have no effect"
    silent = call | {"controlnet_conditioning_scale": 0.0 if nets == 1 else [0.0, 0.0]}
    assert np.array_equal(draw(ours, guidance, latents=noise, **silent)[0], plain)

    generate = request.replace(task="generate", frames=None)
    theirs = controlled(still, "generate", found, loaded)
    for frame in range(FRAMES):
        shown = [each[frame] if isinstance(each, tuple) else each for each in maps]
        expected = theirs(
            prompt="a cat", negative_prompt="bad", num_inference_steps=2, guidance_scale=guidance, width=32,
            height=32, latents=noise[:, :, frame], output_type="np", **control_call(found, shown, generate),
        ).images[0]  # fmt: skip
        assert np.abs(drawn[frame] - expected).max() <= 1e-4


def test_an_sdxl_clip_with_controls_and_a_picture_is_what_diffusers_adapter_draws(tmp_path) -> None:
    pipe = pipeline("sdxl", "text")
    model = saved(tiny_controlnet("sdxl"), tmp_path)
    ref = ControlRef(kind="none", path="map", model=model, scale=0.8)
    request = Request(task="animate", prompt="a cat", frames=FRAMES, controls=[ref])
    found = find_controls(request, Base("tiny", "tiny"))
    ours = controlled(pipe, "animate", found, {model: load_net(found[0], torch.float32)})
    call = control_call(found, [picture(7)], request)
    state = random_adapter_state(pipe.unet)
    texts: list[torch.Tensor] = []
    ours.controlnet.register_forward_hook(
        lambda _, __, given, ___: texts.append(given["encoder_hidden_states"]), with_kwargs=True
    )
    without, before = draw(ours, 5.0, **call), texts[:]
    texts.clear()
    adapter = IPAdapter.from_state_dict(state).attach(ours)
    adapter.set_prompt(picture(1), scale=0.6)
    drawn = draw(ours, 5.0, **call)
    assert all(map(torch.equal, before, texts)), "the picture reached the ControlNet"
    adapter.set_guidance(5.0)
    guided = draw(ours, 5.0, **call)
    adapter.set_guidance(None)
    adapter.detach()
    ours.load_ip_adapter(state, subfolder=None, weight_name=None, image_encoder_folder=None)
    ours.set_ip_adapter_scale(0.6)
    expected = draw(ours, 5.0, ip_adapter_image=picture(1), **call)
    assert np.abs(drawn - expected).max() <= 1e-4
    assert np.abs(guided - expected).max() <= 1e-4
    assert np.abs(drawn - without).max() > 1e-3


def test_our_engine_draws_what_diffusers_pipeline_draws(tmp_path) -> None:
    from imprompt.generation.engine import generate

    tiny_sd().save_pretrained(tmp_path / "base")
    tiny_motion().save_pretrained(tmp_path / "motion")
    asked = Request(
        task="animate", prompt="a cat", negative="bad", base=str(tmp_path / "base"),
        motion=str(tmp_path / "motion"), frames=FRAMES,
        steps=2, guidance=5, seed=5, size=(32, 32),
    )  # fmt: skip
    pipe = pipeline("sd", "text")
    theirs = draw(pipe, 5.0)[0]
    ours = np.stack([np.asarray(image) for image in generate(asked).images]) / 255
    assert np.abs(ours - theirs).max() <= 0.5 / 255 + 1e-4


class Operations(TorchDispatchMode):
    """Every operation, with the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((str(func), [each.shape for each in args if isinstance(each, torch.Tensor)]))
        return func(*args, **(kwargs or {}))


def test_a_picture_a_frame_costs_no_more_operations_than_one() -> None:
    """Frames are rows of one table: a step has the same operations, on tensors of the same sizes."""
    pipe = pipeline("sd", "text")
    adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet)).attach(pipe)
    steps: list[Operations] = []
    # Behind the adapter's own hook, which makes keys and values, once for all steps.
    pipe.unet.register_forward_pre_hook(lambda *_: steps.append(Operations().__enter__()))
    pipe.unet.register_forward_hook(lambda *_: steps[-1].__exit__(None, None, None))
    adapter.set_prompt(picture(1))
    draw(pipe, 5.0)
    one = steps[-1].seen
    adapter.set_prompt(ImagePrompt(image=[picture(i) for i in range(FRAMES)], at=range(FRAMES)))
    draw(pipe, 5.0)
    assert len(one) > 100
    assert steps[-1].seen == one
