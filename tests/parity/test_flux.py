"""XLabs' adapters on tiny FLUX and Chroma pipelines, against diffusers' own load_ip_adapter."""

import tempfile
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import tinydit
from compiled import check_one_graph
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.clip import ImageEncoder
from imprompt.errors import UsageError
from imprompt.schema.prompt import ImagePrompt
from tiny import picture

STEPS = {"num_inference_steps": 3, "output_type": "latent", "height": 32, "width": 48}


def seeds(count: int = 1) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def call(pipe: Any, rows: int = 1, cfg: bool = False, **fields: Any) -> Tensor:
    chroma = "Chroma" in type(pipe).__name__
    pooled = None if chroma else 32
    texts = tinydit.text(rows, pooled=pooled)
    if chroma:
        texts["prompt_attention_mask"] = torch.ones(rows, 7)
    if cfg:
        texts |= tinydit.negative(rows, pooled)
        if chroma:
            texts["negative_prompt_attention_mask"] = torch.ones(rows, 7)
        fields |= {"guidance_scale": 3.0} if chroma else {"true_cfg_scale": 3.0}
    elif chroma:
        fields |= {"guidance_scale": 0.0}
    count = rows * fields.get("num_images_per_prompt", 1)
    images: Tensor = pipe(generator=seeds(count), **STEPS | texts | fields).images
    return images


def theirs(pipe: Any, folder: Path, scale: Any, *, seeds_of_files: tuple[int, ...] = (7,)) -> Any:
    names = []
    for seed in seeds_of_files:
        names.append(f"ip{seed}.safetensors")
        save_file(tinydit.xlabs_state(seed=seed), folder / names[-1])
    pipe.load_ip_adapter([str(folder)] * len(names), weight_name=names, subfolder=[""] * len(names))
    pipe.set_ip_adapter_scale(scale)
    return pipe


def ours(pipe: Any, seed: int = 7) -> IPAdapter:
    encoder = ImageEncoder(tinydit.clip(), tinydit.clip_processor())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ip_adapter.safetensors"
        save_file(tinydit.xlabs_state(seed=seed), file)
        return IPAdapter.from_pretrained(file, image_encoder=encoder).attach(pipe)


MAKERS = {"FLUX": tinydit.flux, "Chroma": tinydit.chroma}


@pytest.mark.parametrize("base", MAKERS)
@pytest.mark.parametrize("scale", [0.5, 1.3, -0.4])
@pytest.mark.parametrize("cfg", [False, True])
def test_one_picture_equals_diffusers(base: str, scale: float, cfg: bool, tmp_path: Path) -> None:
    pipe = MAKERS[base]()
    plain = call(pipe, cfg=cfg)
    adapter = ours(pipe)
    adapter.set_prompt(picture(1), scale=scale)
    got = call(pipe, cfg=cfg)
    adapter.detach()
    assert torch.equal(call(pipe, cfg=cfg), plain)
    wanted = call(theirs(MAKERS[base](), tmp_path, scale), cfg=cfg, ip_adapter_image=picture(1))
    assert (got - plain).abs().max() > 1e-2
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_scale_zero_is_plain_to_the_bit() -> None:
    pipe = tinydit.flux()
    plain = call(pipe, cfg=True)
    ours(pipe).set_prompt(picture(1), scale=0.0)
    assert torch.equal(call(pipe, cfg=True), plain)


def test_weights_per_block_two_pictures_and_a_batch_equal_diffusers(tmp_path: Path) -> None:
    pipe, oracle = tinydit.flux(), theirs(tinydit.flux(), tmp_path, [0.3, 0.9])
    adapter = ours(pipe)
    adapter.set_prompt(picture(1), profile=[0.3, 0.9])
    shown = {"ip_adapter_image": picture(1)}
    torch.testing.assert_close(call(pipe), call(oracle, **shown), atol=1e-5, rtol=1e-5)
    many = {"rows": 2, "cfg": True}
    torch.testing.assert_close(call(pipe, **many), call(oracle, **many, **shown), atol=1e-5, rtol=1e-5)
    oracle.set_ip_adapter_scale(0.7)
    adapter.set_prompt([picture(1), picture(2)], scale=0.7)
    both = {"ip_adapter_image": [[picture(1), picture(2)]]}
    torch.testing.assert_close(call(pipe), call(oracle, **both), atol=1e-5, rtol=1e-5)


def test_two_adapters_equal_diffusers(tmp_path: Path) -> None:
    pipe, oracle = tinydit.flux(), theirs(tinydit.flux(), tmp_path, 0.6, seeds_of_files=(7, 8))
    for seed in (7, 8):
        ours(pipe, seed).set_prompt(picture(seed), scale=0.6)
    shown = {"ip_adapter_image": [picture(7), picture(8)]}
    torch.testing.assert_close(call(pipe, cfg=True), call(oracle, cfg=True, **shown), atol=1e-5, rtol=1e-5)


def test_sixteen_tokens_equal_diffusers(tmp_path: Path) -> None:
    """XLabs' v2; diffusers tells it by 65536 rows, 16 tokens of FLUX's true width."""
    joint = 4096
    save_file(tinydit.xlabs_state(16, joint=joint), tmp_path / "ip.safetensors")
    pipe, oracle = tinydit.flux(joint=joint), tinydit.flux(joint=joint)
    text = tinydit.text(width=joint)
    plain = pipe(generator=seeds(), **STEPS, **text).images
    encoder = ImageEncoder(tinydit.clip(), tinydit.clip_processor())
    adapter = IPAdapter.from_pretrained(tmp_path / "ip.safetensors", image_encoder=encoder).attach(pipe)
    assert adapter.checkpoint.tokens == 16
    adapter.set_prompt(picture(1), profile=[0.3, 0.92])  # a rise, as its authors advise
    got = pipe(generator=seeds(), **STEPS, **text).images
    oracle.load_ip_adapter(str(tmp_path), weight_name="ip.safetensors")
    oracle.set_ip_adapter_scale([0.3, 0.92])
    wanted = oracle(generator=seeds(), ip_adapter_image=picture(1), **STEPS, **text).images
    assert (got - plain).abs().max() > 1e-2
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


# Without both, Kontext draws and reads a megapixel, whatever the size it is called with.
KONTEXT = {"image": picture(3), "_auto_resize": False, "max_area": STEPS["height"] * STEPS["width"]}
TASKS = {
    "image-to-image": (diffusers.FluxImg2ImgPipeline, {"image": picture(3), "strength": 0.7}),
    "inpaint": (
        diffusers.FluxInpaintPipeline,
        {"image": picture(3), "mask_image": Image.new("L", (48, 32), 255), "strength": 0.7},
    ),
    "Kontext": (diffusers.FluxKontextPipeline, KONTEXT),
}


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_equal_diffusers(task: str, tmp_path: Path) -> None:
    kind, fields = TASKS[task]
    pipe = tinydit.flux(kind)
    plain = call(pipe, cfg=True, **fields)
    ours(pipe).set_prompt(picture(1), scale=0.8)
    got = call(pipe, cfg=True, **fields)
    oracle = theirs(tinydit.flux(kind), tmp_path, 0.8)
    wanted = call(oracle, cfg=True, **fields, ip_adapter_image=picture(1))
    assert (got - plain).abs().max() > 1e-2
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_batch_shows_each_sample_its_own_picture() -> None:
    """diffusers mixes them (huggingface/diffusers#13959)."""
    pipe = tinydit.flux()
    adapter = ours(pipe)
    prompts = [ImagePrompt(picture(seed), scale=0.8, mask=mask) for seed, mask in ((1, None), (2, left()))]
    adapter.set_batch(prompts)
    together = call(pipe, 2, cfg=True)
    for i, prompt in enumerate(prompts):
        adapter.set_prompt(prompt)
        texts = {k: v[i : i + 1] for k, v in (tinydit.text(2) | tinydit.negative(2)).items()}
        alone = pipe(generator=seeds(2)[i], true_cfg_scale=3.0, **STEPS, **texts).images
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def left() -> Tensor:
    mask = torch.zeros(8, 12)
    mask[:, :6] = 1
    return mask


def _terms(pipe: Any, draw: Any) -> Tensor:
    """What the first double block adds to each token in the first step: rows, tokens, width."""
    found: list[Tensor] = []
    block = pipe.transformer.transformer_blocks[0].attn
    handle = block.register_forward_hook(
        lambda module, args, out: found.append(out[2]) if len(out) > 2 else None
    )
    try:
        draw()
    finally:
        handle.remove()
    return found[0]


@pytest.mark.parametrize("kind", [diffusers.FluxPipeline, diffusers.FluxKontextPipeline])
def test_a_mask_keeps_each_picture_to_its_tokens(kind: type[Any]) -> None:
    pipe = tinydit.flux(kind)
    fields = KONTEXT if "Kontext" in kind.__name__ else {}
    one, other = ours(pipe), ours(pipe, 8)
    terms = {}
    for name, pictures in {
        "one": (left(), None),
        "other": (None, 1 - left()),
        "both": (left(), 1 - left()),
    }.items():
        for adapter, mask in zip((one, other), pictures, strict=True):
            adapter.clear_prompt() if mask is None else adapter.set_prompt(picture(1), mask=mask)
        terms[name] = _terms(pipe, lambda: call(pipe, **fields))
    grid = {name: term[:, :96].unflatten(1, (8, 12)) for name, term in terms.items()}
    assert not grid["one"][:, :, 6:].any()
    assert not grid["other"][:, :, :6].any()
    assert not terms["both"][:, 96:].any()  # Kontext's reference
    torch.testing.assert_close(terms["both"], terms["one"] + terms["other"])


def test_a_mask_of_ones_changes_nothing() -> None:
    pipe = tinydit.flux()
    adapter = ours(pipe)
    adapter.set_prompt(picture(1))
    wanted = call(pipe)
    adapter.set_prompt(picture(1), mask=torch.ones(5, 5))
    assert torch.equal(call(pipe), wanted)


@pytest.mark.parametrize("window", [(0.0, 0.34), (0.34, 1.0)])
def test_a_window_is_a_share_of_the_steps(window: tuple[float, float]) -> None:
    pipe = tinydit.flux()
    adapter = ours(pipe)
    adapter.set_prompt(picture(1), start=window[0], end=window[1])
    acting = []
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.register_forward_hook(lambda module, args, out: acting.append(bool(out[2].any())))
    call(pipe)
    assert acting == ([True, True, False] if window[0] == 0 else [False, False, True])


def test_without_a_picture_nothing_happens_and_nothing_fails() -> None:
    """diffusers raises TypeError."""
    pipe = tinydit.flux()
    plain = call(pipe)
    ours(pipe)
    assert torch.equal(call(pipe), plain)


def test_a_negative_that_is_the_prompts_own_text_is_told_by_the_order_of_calls(tmp_path: Path) -> None:
    pipe, oracle = tinydit.flux(), theirs(tinydit.flux(), tmp_path, 0.8)
    text = tinydit.text()
    guided = text | {f"negative_{name}": value for name, value in text.items()} | {"true_cfg_scale": 3.0}
    ours(pipe).set_prompt(picture(1), scale=0.8)
    wanted = call(oracle, **guided, ip_adapter_image=picture(1))
    torch.testing.assert_close(call(pipe, **guided), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", MAKERS)
def test_guidance_of_the_images_own_is_ordinary_at_the_same_scale(base: str) -> None:
    pipe = MAKERS[base]()
    adapter = ours(pipe)
    adapter.set_prompt(picture(1))
    wanted = call(pipe, cfg=True)
    adapter.set_guidance(3.0)
    torch.testing.assert_close(call(pipe, cfg=True), wanted, atol=1e-4, rtol=1e-4)
    adapter.set_guidance(0.0)
    assert not torch.allclose(call(pipe, cfg=True), wanted, atol=1e-2)


def test_regional_text_and_named_profiles_are_refused() -> None:
    pipe = tinydit.flux()
    adapter = ours(pipe)
    with pytest.raises(UsageError, match="needs the measured roles of UNet blocks"):
        adapter.set_prompt(picture(1), profile="style")
    with pytest.raises(UsageError, match="regional text is not supported"):
        adapter.set_prompt(picture(1), mask=left(), text=torch.zeros(4, tinydit.JOINT))


@pytest.mark.slow
@pytest.mark.xdist_group("compiled")
def test_a_compiled_transformer_compiles_nothing_anew_for_another_prompt() -> None:
    check_one_graph("test_flux", "call", '({"scale": 0.9, "end": 0.5}, {"scale": 0.2, "end": 0.5})')
