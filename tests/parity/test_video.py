"""Our clips equal diffusers' own IP-Adapter path on the same weights: text to video, video to video, and what
diffusers does by hand for one picture a frame."""

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AnimateDiffVideoToVideoPipeline,
    UNetMotionModel,
)

from imprompt.adapter.adapter import IPAdapter
from imprompt.adapter.prompt import ImagePrompt
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
        extra |= {"video": [picture(60 + i) for i in range(FRAMES)], "strength": 0.7}
    else:
        extra |= {"num_frames": FRAMES}
    frames = pipe(
        prompt="a cat", negative_prompt="bad", num_inference_steps=3, guidance_scale=guidance, width=32,
        height=32,
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


def test_our_engine_draws_what_diffusers_pipeline_draws(tmp_path) -> None:
    from imprompt.generation.engine import generate
    from imprompt.generation.request import Request

    tiny_sd().save_pretrained(tmp_path / "base")
    tiny_motion().save_pretrained(tmp_path / "motion")
    asked = Request(
        task="animate", prompt="a cat", negative="bad", base=str(tmp_path / "base"),
        motion=str(tmp_path / "motion"), frames=FRAMES,
        steps=3, guidance=5, seed=5, size=(32, 32),
    )  # fmt: skip
    pipe = pipeline("sd", "text")
    theirs = draw(pipe, 5.0)[0]
    ours = np.stack([np.asarray(image) for image in generate(asked).images]) / 255
    assert np.abs(ours - theirs).max() <= 0.5 / 255 + 1e-4


def test_a_picture_a_frame_costs_no_more_passes_than_one(monkeypatch) -> None:
    """Frames are rows of one table: as many calls of the attention, each of the same size."""
    pipe = pipeline("sd", "text")
    adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet)).attach(pipe)
    calls: list[tuple[int, ...]] = []
    from imprompt.adapter import attention

    read = attention.Group.read
    monkeypatch.setattr(
        attention.Group, "read", lambda self, query: calls.append(self.key.shape) or read(self, query)
    )
    adapter.set_prompt(picture(1))
    draw(pipe, 5.0)
    one, calls[:] = list(calls), []
    adapter.set_prompt(ImagePrompt(image=[picture(i) for i in range(FRAMES)], at=range(FRAMES)))
    draw(pipe, 5.0)
    assert calls == one
