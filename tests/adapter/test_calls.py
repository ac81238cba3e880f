"""A denoiser reads image prompts the same, however the arguments of its call are passed."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tinydit
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.schema.prompt import ImagePrompt
from tiny import TEXT_WIDTH, random_adapter_state, tiny_unet

GRID = (4, 6)
TOKENS = GRID[0] * GRID[1]
"""As many rows as position ids have, so that ids may be taken for rows of a batch."""


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def ids(rows: int, columns: int) -> Tensor:
    grid = torch.zeros(rows, columns, 3)
    grid[..., 1], grid[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    return grid.flatten(0, 1)


def flux_call() -> dict[str, Any]:
    """A batch as large as there are position ids."""
    return {
        "hidden_states": noise(TOKENS, TOKENS, 16),
        "encoder_hidden_states": noise(TOKENS, 7, tinydit.JOINT),
        "pooled_projections": noise(TOKENS, 32),
        "timestep": torch.full((TOKENS,), 0.7),
        "img_ids": ids(*GRID),
        "txt_ids": torch.zeros(7, 3),
        "guidance": torch.full((TOKENS,), 3.5),
    }


def chroma_call() -> dict[str, Any]:
    call = flux_call()
    return {name: value for name, value in call.items() if name not in ("pooled_projections", "guidance")}


def sd3_call() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "encoder_hidden_states": noise(2, 7, tinydit.JOINT),
        "pooled_projections": noise(2, 64),
        "timestep": torch.full((2,), 700.0),
    }


def unet_call() -> dict[str, Any]:
    return {"sample": noise(2, 4, 8, 8), "timestep": 500, "encoder_hidden_states": noise(2, 5, TEXT_WIDTH)}


def features(*shape: int) -> ImagePrompt:
    return ImagePrompt(features=noise(*shape), negative=torch.zeros(shape))


def published(state: dict[str, Tensor]) -> IPAdapter:
    """An adapter from a file with an author's own keys."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, file := Path(folder) / "ip_adapter.safetensors")
        return IPAdapter.from_pretrained(file)


Made = tuple[nn.Module, IPAdapter, ImagePrompt, dict[str, Any]]


def of_flux() -> Made:
    model = tinydit.flux().transformer
    return model, published(tinydit.xlabs_state()), features(tinydit.POOLED), flux_call()


def of_redux() -> Made:
    model, _, _, call = of_flux()
    return model, published(tinydit.redux_state()), features(16, 24), call


def of_chroma() -> Made:
    model = tinydit.chroma().transformer
    return model, published(tinydit.xlabs_state()), features(tinydit.POOLED), chroma_call()


def of_sd3() -> Made:
    model = tinydit.sd3().transformer
    return model, IPAdapter.from_state_dict(tinydit.instantx_sd3_state()), features(16, 24), sd3_call()


def of_unet() -> Made:
    unet = tiny_unet("sd")
    return unet, IPAdapter.from_state_dict(random_adapter_state(unet)), features(24), unet_call()


MADE: dict[str, Callable[[], Made]] = {
    "FLUX": of_flux, "Redux": of_redux, "Chroma": of_chroma, "SD3": of_sd3, "UNet": of_unet
}  # fmt: skip


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_positional_arguments_are_read_as_keywords_are(name: str, guided: bool) -> None:
    model, adapter, prompt, call = MADE[name]()
    rest = {"return_dict": False}
    with torch.no_grad():
        plain = model(**call, **rest)[0]
        adapter.attach(model)
        adapter.set_prompt(prompt, scale=0.8)
        if guided:
            adapter.set_guidance(2.0, text=1.0)
        wanted = model(**call, **rest)[0]
        assert (wanted - plain).abs().max() > 1e-3
        for count in range(1, len(call) + 1):
            first, others = list(call.values())[:count], dict(list(call.items())[count:])
            assert torch.equal(model(*first, **others, **rest)[0], wanted), count


class _Passing(diffusers.FluxTransformer2DModel):
    """As programs derive one that counts calls."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_forward_that_passes_its_arguments_on_is_read_as_the_one_behind_it() -> None:
    model, adapter, prompt, call = of_flux()
    adapter.attach(model)
    adapter.set_prompt(prompt, scale=0.8)
    with torch.no_grad():
        wanted = model(**call, return_dict=False)[0]
        adapter.detach()
        model.__class__ = _Passing
        adapter.attach(model)
        adapter.set_prompt(prompt, scale=0.8)
        assert torch.equal(model(*call.values(), return_dict=False)[0], wanted)
