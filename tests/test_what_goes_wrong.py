"""What goes wrong elsewhere with adapters: one clear line, and the adapter there draws on unchanged."""

import gc
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from facemodels import pack, photo
from faces import face_state, person
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.errors import ImpromptError
from tiny import HIDDEN, PICTURE, POOLED, picture, random_adapter_state, tiny_encoder, tiny_sd, tiny_unet

State = dict[str, dict[str, torch.Tensor]]


def draw(pipe: StableDiffusionPipeline) -> np.ndarray:
    return pipe(
        "a cat",
        num_inference_steps=2,
        width=PICTURE,
        height=PICTURE,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


def saved(state: State, path: Path, **more: torch.Tensor) -> Path:
    flat = {f"{part}.{key}": tensor for part, tensors in state.items() for key, tensor in tensors.items()}
    save_file({key: tensor.contiguous() for key, tensor in (flat | more).items()}, path)
    return path


def good(family: str = "sd", kind: str = "linear") -> State:
    return random_adapter_state(tiny_unet(family), kind, seed=5)


def without(part: str, key: str | None) -> State:
    state = good()
    return state | {part: {name: w for name, w in state[part].items() if key is not None and name != key}}


def spoiled() -> State:
    state = good()
    state["ip_adapter"]["3.to_v_ip.weight"][0, 0] = math.nan
    return state


def cut(path: Path) -> Path:
    whole = saved(good(), path).read_bytes()
    path.write_bytes(whole[:-100])
    return path


def bomb(path: Path) -> Path:
    """A header that claims more than there is memory."""
    entry = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}
    text = json.dumps({"image_proj.proj.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def huge_header(path: Path) -> Path:
    path.write_bytes(struct.pack("<Q", 2**40) + b"{")
    return path


def pickled(path: Path) -> Path:
    torch.save(good(), path)
    return path


def lora(path: Path) -> Path:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    save_file({f"{name}.down.weight": torch.ones(2, 4), f"{name}.up.weight": torch.ones(4, 2)}, path)
    return path


def wrong_encoder(path: Path) -> IPAdapter:
    model, processor = tiny_encoder(POOLED + 8, HIDDEN)
    model.save_pretrained(path.parent / "encoder")
    processor.save_pretrained(path.parent / "encoder")
    return IPAdapter.from_pretrained(saved(good(), path), image_encoder=path.parent / "encoder")


def faceless(path: Path) -> IPAdapter:
    adapter = IPAdapter.from_state_dict(face_state(tiny_unet()))
    adapter.face_embedder = pack(path.parent / "faces")
    adapter.set_prompt(photo())
    return adapter


ROWS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an adapter of another base": (lambda path: saved(good("sdxl"), path), "was made for a UNet with"),
    "an adapter for another encoder": (wrong_encoder, f"pooled features of width {POOLED}.*{POOLED + 8}"),
    "a missing key": (
        lambda path: saved(without("ip_adapter", "1.to_k_ip.weight"), path),
        "missing: '1.to_k_ip",
    ),
    "a missing key of the projection": (lambda p: saved(without("image_proj", "norm.bias"), p), "norm.bias"),
    "an empty image_proj": (lambda path: saved(without("image_proj", None), path), "empty 'image_proj'"),
    "an empty ip_adapter": (lambda path: saved(without("ip_adapter", None), path), "no to_k_ip and to_v_ip"),
    "extra keys": (lambda path: saved(good(), path, extra=torch.ones(2)), "beside .* it has 'extra'"),
    "NaN weights": (lambda path: saved(spoiled(), path), r"NaN or infinite weights in 'ip_adapter\.3"),
    "a truncated file": (cut, "is truncated"),
    "a header that claims terabytes": (bomb, "is truncated"),
    "a header longer than the file": (huge_header, "it would have a header of 1,099"),
    "a pickle under the name of a safetensors": (pickled, "is a pickle under the name"),
    "a LoRA without its adapter": (lora, "is a LoRA"),
    "a face adapter shown no face": (faceless, "no face was found"),
}


def load(make: Callable[[Path], object], path: Path, pipe: StableDiffusionPipeline) -> None:
    made = make(path)
    assert isinstance(made, Path), "the others fail while they are made"
    IPAdapter.from_pretrained(made).attach(pipe)


@pytest.mark.parametrize("row", ROWS)
def test_after_a_refused_load_the_previous_adapter_still_gives_identical_pixels(
    row: str, tmp_path: Path
) -> None:
    make, message = ROWS[row]
    pipe = tiny_sd()
    model, processor = tiny_encoder()
    pipe.register_modules(image_encoder=model, feature_extractor=processor)
    adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet)).attach(pipe)
    adapter.set_prompt(picture(1))
    before, processors = draw(pipe), dict(pipe.unet.attn_processors)
    with pytest.raises(ImpromptError, match=message) as error:
        load(make, tmp_path / "bad.safetensors", pipe)
    assert "\n" not in str(error.value)
    assert pipe.unet.attn_processors == processors
    assert np.array_equal(draw(pipe), before)


def test_many_times_loaded_drawn_and_taken_off_leave_no_memory_and_the_same_pixels(tmp_path: Path) -> None:
    unet = tiny_unet()
    path = saved(face_state(unet), tmp_path / "face.safetensors")
    sample, states = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 32)

    def once() -> torch.Tensor:
        adapter = IPAdapter.from_pretrained(path).attach(unet)
        adapter.set_prompt(person())
        with torch.no_grad():
            shown = unet(sample, 500, states).sample
        adapter.detach()
        return shown

    first = once()
    with torch.no_grad():
        bare = unet(sample, 500, states).sample
    for _ in range(10):
        once()
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(30):  # of two megabytes each
        last = once()
    gc.collect()
    assert abs(psutil.Process().memory_info().rss / before - 1) < 0.01
    assert torch.equal(first, last)
    with torch.no_grad():
        assert torch.equal(unet(sample, 500, states).sample, bare)
