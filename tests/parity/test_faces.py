"""Face adapters, their LoRA included, draw what diffusers draws of the same file and the same embeddings."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from faces import face_state, person
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.face import Faces
from parity.test_diffusers import close, draw, pipeline, theirs
from tiny import HIDDEN, StateDict


def noise(*shape: int, seed: int = 4) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ours(
    pipe: DiffusionPipeline, state: StateDict, shown: object, variant: str | None = None, **how
) -> np.ndarray:
    adapter = IPAdapter.from_state_dict(state, variant=variant).attach(pipe)
    adapter.set_prompt(shown, scale=0.8)
    drawn = draw(pipe, **how)
    adapter.detach()
    return drawn


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize(("variant", "rank"), [("faceid", 4), ("faceid", None), ("portrait", None)])
def test_faceid_and_portrait_draw_what_diffusers_draws(
    family: str, variant: str, rank: int | None, guidance: float
) -> None:
    pipe = pipeline(family)
    state, who = face_state(pipe.unet, variant, rank=rank), person()
    before = draw(pipe, guidance=guidance)
    drawn = ours(pipe, state, who, guidance=guidance)
    assert np.array_equal(draw(pipe, guidance=guidance), before)
    embeds = torch.stack([torch.zeros_like(who), who]) if guidance > 1 else who[None]
    assert close(drawn, theirs(pipe, [state], 0.8, {"ip_adapter_image_embeds": [embeds]}, guidance=guidance))


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("s_scale", [1.0, 0.4])
@pytest.mark.parametrize("variant", ["faceid-plus", "faceid-plusv2"])
def test_faceid_plus_draws_what_diffusers_draws(variant: str, s_scale: float, guidance: float) -> None:
    pipe = pipeline("sdxl")
    state, who = face_state(pipe.unet, variant), person()
    crop, zero = noise(1, 17, HIDDEN), noise(1, 17, HIDDEN, seed=5)
    adapter = IPAdapter.from_state_dict(state, variant=variant).attach(pipe)
    fields = {"s_scale": s_scale} if variant == "faceid-plusv2" else {}
    adapter.set_prompt(Faces(20 * who, "unknown", crop, zero), scale=0.8, **fields)
    drawn = draw(pipe, guidance=guidance)
    adapter.detach()
    pipe.load_ip_adapter(state, subfolder=[None], weight_name=[None], image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.8)
    theirs = pipe.unet.encoder_hid_proj.image_projection_layers[0]
    theirs.shortcut, theirs.shortcut_scale = variant == "faceid-plusv2", s_scale
    theirs.clip_embeds = torch.stack([zero, crop]) if guidance > 1 else crop[None]
    embeds = torch.stack([torch.zeros_like(who), who]) if guidance > 1 else who[None]
    assert close(drawn, draw(pipe, ip_adapter_image_embeds=[embeds], guidance=guidance))


def test_a_raw_embedding_draws_what_diffusers_draws_of_a_sequence_of_one() -> None:
    pipe = pipeline("sdxl")
    state, who = face_state(pipe.unet, "faceid-raw", rank=None), person(length=23.0)
    drawn = ours(pipe, state, who, "faceid-raw")
    embeds = torch.stack([torch.zeros_like(who), who])[:, None]
    assert close(drawn, theirs(pipe, [state], 0.8, {"ip_adapter_image_embeds": [embeds]}))


def test_several_photos_of_a_person_draw_what_diffusers_draws() -> None:
    pipe = pipeline("sd")
    state, photos = face_state(pipe.unet, "portrait", rank=None), person(count=5)
    drawn = ours(pipe, state, photos)
    embeds = torch.stack([torch.zeros_like(photos), photos])
    assert close(drawn, theirs(pipe, [state], 0.8, {"ip_adapter_image_embeds": [embeds]}))


def test_a_file_with_lora_saved_here_draws_the_same_in_diffusers(tmp_path) -> None:
    pipe = pipeline("sd")
    state, who = face_state(pipe.unet), person()
    path = IPAdapter.from_state_dict(state).save_pretrained(tmp_path, "face.safetensors")
    adapter = IPAdapter.from_pretrained(path).attach(pipe)
    adapter.set_prompt(who, scale=0.8)
    drawn = draw(pipe)
    adapter.detach()
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=path.name, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.8)
    embeds = torch.stack([torch.zeros_like(who), who])
    assert close(drawn, draw(pipe, ip_adapter_image_embeds=[embeds]))
