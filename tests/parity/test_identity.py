"""InstantID's ControlNet hears the face: against ControlNets written to read the tokens themselves."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline

from controls import tiny_controlnet
from imprompt.errors import ModelError
from imprompt.generation.identity import face_states
from tiny import PICTURE, picture, tiny_sdxl


class Hearing(ControlNetModel):
    """A ControlNet that reads its own ``tokens``, rows [negative, positive] as the published pipeline."""

    tokens: torch.Tensor

    def forward(self, sample: torch.Tensor, timestep: Any, **call: Any) -> Any:
        rows = self.tokens if len(sample) == len(self.tokens) else self.tokens.chunk(2)[1]
        return super().forward(sample, timestep, **{**call, "encoder_hidden_states": rows})


def hearing(net: ControlNetModel, tokens: torch.Tensor) -> Hearing:
    made = Hearing.from_config(net.config)
    made.load_state_dict(net.state_dict())
    made.tokens = tokens
    return made.eval()


def tokens(count: int, seed: int) -> torch.Tensor:
    width = tiny_sdxl().unet.config.cross_attention_dim
    return torch.randn(count, 16, width, generator=torch.Generator().manual_seed(seed))


def draw(pipe: Any, **call: Any) -> np.ndarray:
    call = {"prompt": "a cat", "guidance_scale": 5.0, "controlnet_conditioning_scale": 0.8, **call}
    result = pipe(
        num_inference_steps=2, height=PICTURE, width=PICTURE, output_type="np",
        generator=torch.Generator().manual_seed(3), **call,
    )  # fmt: skip
    return result.images


def pipeline(net: Any) -> Any:
    pipe = StableDiffusionXLControlNetPipeline(**tiny_sdxl().components, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    return pipe


FACE, OTHER = SimpleNamespace(reads_face=True), SimpleNamespace(reads_face=False)


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("count", [1, 2])
def test_the_controlnet_reads_face_tokens_in_place_of_text(guidance: float, count: int) -> None:
    net = tiny_controlnet("sdxl")
    negative, positive = tokens(count, 1), tokens(count, 2)
    call = {"image": [picture(4)] * count, "guidance_scale": guidance, "prompt": ["a cat"] * count}
    plain = draw(pipeline(net), **call)
    pipe = pipeline(net)
    with face_states(pipe, [FACE], negative, positive):
        heard = draw(pipe, **call)
    expected = draw(pipeline(hearing(net, torch.cat([negative, positive]))), **call)
    assert np.array_equal(heard, expected)
    assert np.abs(heard - plain).max() > 0.01
    assert np.array_equal(draw(pipe, **call), plain)  # no trace


def test_guess_mode_reads_the_positive_tokens() -> None:
    net = tiny_controlnet("sdxl")
    negative, positive = tokens(1, 1), tokens(1, 2)
    pipe = pipeline(net)
    with face_states(pipe, [FACE], negative, positive):
        heard = draw(pipe, image=picture(4), guess_mode=True)
    expected = draw(
        pipeline(hearing(net, torch.cat([negative, positive]))), image=picture(4), guess_mode=True
    )
    assert np.array_equal(heard, expected)


def test_of_several_controlnets_only_those_of_faces_do() -> None:
    nets = [tiny_controlnet("sdxl", seed) for seed in (11, 12)]
    negative, positive = tokens(1, 1), tokens(1, 2)
    call = {"image": [picture(4), picture(5)], "controlnet_conditioning_scale": [0.8, 0.6]}
    pipe = pipeline(nets)
    with face_states(pipe, [OTHER, FACE], negative, positive):
        heard = draw(pipe, **call)
    expected = draw(pipeline([nets[0], hearing(nets[1], torch.cat([negative, positive]))]), **call)
    assert np.array_equal(heard, expected)


def test_hooks_are_removed_after_an_error_and_rows_that_do_not_fit_are_one() -> None:
    net = tiny_controlnet("sdxl")
    pipe = pipeline(net)
    with (
        pytest.raises(ModelError, match="3 pictures do not fit 2 rows"),
        face_states(pipe, [FACE], tokens(3, 1), tokens(3, 2)),
    ):
        draw(pipe, image=picture(4))
    assert not net._forward_pre_hooks
