"""A tiny UNet with an adapter for the tests of a file, unless it has fixtures of these names itself."""

import pytest
from diffusers import UNet2DConditionModel

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.clip import ImageEncoder
from tiny import random_adapter_state, tiny_encoder, tiny_unet


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return tiny_unet("sd")


@pytest.fixture(scope="module")
def adapter(unet: UNet2DConditionModel) -> IPAdapter:
    encoder = ImageEncoder(*tiny_encoder(), name="tiny")
    return IPAdapter.from_state_dict(random_adapter_state(unet), image_encoder=encoder).attach(unet)
