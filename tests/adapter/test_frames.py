"""Prompts over the frames of a video, on a tiny real video UNet: each frame sees what it would see alone."""

import pytest
import torch
from diffusers import UNetMotionModel

import tiny
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.errors import InputError, UsageError
from imprompt.schema.prompt import ImagePrompt

FRAMES = 4


@pytest.fixture(scope="module")
def video():
    """An adapter on a video UNet whose temporal layers are silent: frames are then independent stills."""
    unet = UNetMotionModel.from_unet2d(tiny.tiny_unet(), tiny.tiny_motion()).eval()
    for name, module in unet.named_modules():
        if name.endswith("proj_out") and "motion_modules" in name:
            module.weight.data.zero_()
            module.bias.data.zero_()
    return IPAdapter.from_state_dict(tiny.random_adapter_state(unet)).attach(unet), unet


def tokens(seed: int, pictures: int = 1) -> torch.Tensor:
    return torch.randn(pictures, 4, 32, generator=torch.Generator().manual_seed(seed))


def drawn(video, *prompts: ImagePrompt, batch: int = 1) -> torch.Tensor:
    adapter, unet = video
    adapter.set_prompt(list(prompts))
    random = torch.Generator().manual_seed(2)
    sample = torch.randn(batch, 4, FRAMES, 16, 16, generator=random)
    text = torch.randn(batch, 6, 32, generator=random).repeat_interleave(FRAMES, 0)
    with torch.no_grad():
        return unet(sample, torch.tensor(500), text).sample


def shown(video, number: int, **fields: object) -> torch.Tensor:
    """All frames, of which each shows only picture ``number``."""
    return drawn(video, ImagePrompt(tokens=tokens(1, 3)[number : number + 1], **fields))


def test_a_picture_a_frame_shows_each_frame_its_own(video):
    keys = torch.cat([tokens(1, 3), tokens(1, 3)[:1]])
    ours = drawn(video, ImagePrompt(tokens=keys, at=range(FRAMES)))
    for frame, number in enumerate((0, 1, 2, 0)):
        assert torch.allclose(ours[:, :, frame], shown(video, number)[:, :, frame], atol=1e-5)


def test_between_key_pictures_tokens_are_interpolated(video):
    first, last = tokens(1, 3)[:1], tokens(1, 3)[1:2]
    ours = drawn(video, ImagePrompt(tokens=torch.cat([first, last]), at=(0, 3)))
    for frame in range(FRAMES):
        between = ImagePrompt(tokens=first + (last - first) * frame / 3)
        assert torch.allclose(ours[:, :, frame], drawn(video, between)[:, :, frame], atol=1e-5)


def test_before_the_first_key_and_after_the_last_nothing_changes(video):
    ours = drawn(video, ImagePrompt(tokens=tokens(1, 3)[:2], at=(1, 2)))
    assert torch.allclose(ours[:, :, 0], shown(video, 0)[:, :, 0], atol=1e-5)
    assert torch.allclose(ours[:, :, 3], shown(video, 1)[:, :, 3], atol=1e-5)


def test_a_curve_over_frames_is_the_scale_of_each_frame(video):
    ours = drawn(video, ImagePrompt(tokens=tokens(1, 3)[:1], scale=0.9, frame_curve="0:0,1:1"))
    for frame in range(FRAMES):
        alone = shown(video, 0, scale=0.9 * frame / 3)
        assert torch.allclose(ours[:, :, frame], alone[:, :, frame], atol=1e-5)


def test_each_frame_has_its_own_mask(video):
    masks = torch.zeros(FRAMES, 16, 16)
    masks[1, :, :8] = 1
    masks[3] = 1
    ours = drawn(video, ImagePrompt(tokens=tokens(1, 3)[:1], mask=masks))
    nothing = shown(video, 0, scale=0.0)
    assert torch.equal(ours[:, :, 0], nothing[:, :, 0])
    assert torch.allclose(ours[:, :, 1], shown(video, 0, mask=masks[1])[:, :, 1], atol=1e-5)
    assert torch.allclose(ours[:, :, 3], shown(video, 0)[:, :, 3], atol=1e-5)


def test_prompts_with_and_without_a_track_add_up_in_a_batch_of_clips(video):
    still = ImagePrompt(tokens=tokens(5), scale=0.5)
    moving = ImagePrompt(tokens=tokens(1, 3), at=(0, 1, 3))
    together = drawn(video, still, moving, batch=2)
    negative = tokens(6)[0]
    video[0].batch(guidance=True)  # the first clip is now the unconditional half
    try:
        guided = drawn(video, still.replace(negative=negative), moving.replace(negative=negative), batch=2)
    finally:
        video[0].batch(guidance=None)
    assert torch.allclose(guided[1], together[1], atol=1e-5)
    assert not torch.allclose(guided[0], together[0], atol=1e-3)


def test_temporal_attention_is_never_prompted():
    unet = UNetMotionModel.from_unet2d(tiny.tiny_unet(), tiny.tiny_motion()).eval()
    before = {name: p for name, p in unet.attn_processors.items() if "motion_modules" in name}
    adapter = IPAdapter.from_state_dict(tiny.random_adapter_state(unet)).attach(unet)
    after = {name: p for name, p in unet.attn_processors.items() if "motion_modules" in name}
    assert before
    assert all(after[name] is before[name] for name in before)
    adapter.detach()


REFUSED = [
    (UsageError, "at: .*each larger than the one before it", {"at": (2, 1)}),
    (UsageError, "whole numbers", {"at": (-1, 1)}),
    (UsageError, "3 frames are given for 2 pictures", {"at": (0, 1, 2)}),
    (UsageError, "stands at frame 9.*0 to 3", {"at": (0, 9)}),
    (UsageError, "3 masks are given for 4 frames", {"mask": torch.ones(3, 8, 8)}),
    (InputError, "0 in every frame", {"mask": torch.zeros(4, 8, 8)}),
    (UsageError, "curve", {"frame_curve": "sudden"}),
]


@pytest.mark.parametrize(("kind", "message", "fields"), REFUSED)
def test_frames_that_do_not_fit_are_said(video, kind, message, fields):
    with pytest.raises(kind, match=message):
        drawn(video, ImagePrompt(tokens=tokens(1, 2), **fields))
    drawn(video, ImagePrompt(tokens=tokens(1, 2)))


def test_stills_have_no_frames():
    unet = tiny.tiny_unet()
    adapter = IPAdapter.from_state_dict(tiny.random_adapter_state(unet)).attach(unet)
    adapter.set_prompt(ImagePrompt(tokens=tokens(1, 2), at=(0, 1)))
    with pytest.raises(UsageError, match="stills are drawn"):
        unet(torch.zeros(1, 4, 16, 16), torch.tensor(5), torch.zeros(1, 6, 32))
