"""What is changed after a prompt was set takes effect at the next call, as if it had been set anew."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from faces import face_state, person
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.errors import ImpromptError, InputError, UsageError
from tiny import POOLED, TEXT_WIDTH, random_adapter_state, tiny_unet


@torch.no_grad()
def draw(unet: UNet2DConditionModel) -> Tensor:
    random = torch.Generator().manual_seed(1)
    sample, text = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 5, TEXT_WIDTH, generator=random)
    return unet(sample, 500.0, text).sample


def scale_in_place(adapter: IPAdapter, name: str) -> None:
    weights = dict(adapter.named_parameters())
    with torch.no_grad():
        weights[next(key for key in weights if name in key)].mul_(1.5)


@pytest.mark.parametrize("name", ["image_proj", "to_k_ip", "to_v_ip"])
def test_weights_changed_in_place_act_at_the_next_call(name: str) -> None:
    unet = tiny_unet()
    adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    features = torch.randn(1, POOLED, generator=torch.Generator().manual_seed(3))
    adapter.set_prompt(features)
    before = draw(unet)
    scale_in_place(adapter, name)
    changed = draw(unet)
    adapter.set_prompt(features)
    assert not torch.equal(changed, before)
    assert torch.equal(changed, draw(unet))


def test_weights_that_are_replaced_act_at_the_next_call() -> None:
    unet = tiny_unet()
    adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    other = IPAdapter.from_state_dict(random_adapter_state(unet, seed=9))
    features = torch.ones(1, POOLED)
    adapter.set_prompt(features)
    before = draw(unet)
    adapter.module.load_state_dict(other.module.state_dict(), assign=True)
    changed = draw(unet)
    adapter.detach()
    other.attach(unet).set_prompt(features)
    assert not torch.equal(changed, before)
    assert torch.equal(changed, draw(unet))


def test_the_loras_scale_acts_at_the_next_call() -> None:
    unet = tiny_unet()
    adapter = IPAdapter.from_state_dict(face_state(unet, "faceid"), variant="faceid").attach(unet)
    adapter.set_prompt(person())
    before = draw(unet)
    assert adapter.lora is not None
    adapter.lora.scale = 0.3
    changed = draw(unet)
    adapter.set_prompt(person())
    assert not torch.equal(changed, before)
    assert torch.equal(changed, draw(unet))


@pytest.mark.parametrize(
    ("features", "fields", "error", "said"),
    [
        (torch.ones(1, POOLED), {"scale": 1e9}, UsageError, "less than or equal to 10"),
        (torch.ones(1, POOLED), {"scale": float("nan")}, UsageError, "finite"),
        (torch.full((1, POOLED), 1e38), {}, InputError, "too large"),
        (torch.full((1, POOLED), float("inf")), {}, InputError, "NaN or infinite"),
        (torch.ones(1, POOLED), {"curve": [(0, 1e9)]}, UsageError, "from -10 to 10"),
    ],
)
def test_numbers_that_are_not_meant_are_refused(
    features: Tensor, fields: dict[str, object], error: type[ImpromptError], said: str
) -> None:
    unet = tiny_unet()
    adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    adapter.set_prompt(torch.ones(1, POOLED))
    before = draw(unet)
    with pytest.raises(error, match=said):
        adapter.set_prompt(features, **fields)
    assert torch.equal(draw(unet), before)
