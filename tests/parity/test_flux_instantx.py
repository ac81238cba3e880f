"""InstantX's FLUX adapter on a tiny FLUX, against its formula written again with plain forward hooks.

diffusers cannot load it. The formula: keys RMS-normed per head without weights (eps 1e-5), values raw, query
after the base's norm and before RoPE; the sum enters before the output projection in double blocks, and in
single blocks (over text tokens too) before the MLP branch joins.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tinydit
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.schema.prompt import ImagePrompt

HEADS, DOUBLES, SINGLES = 2, 2, 3
SIZE: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 3, "output_type": "latent"}


def call(pipe: Any, **fields: Any) -> Tensor:
    texts = tinydit.text() | (tinydit.negative() if "true_cfg_scale" in fields else {})
    generator = torch.Generator().manual_seed(0)
    images: Tensor = pipe(generator=generator, **SIZE, **texts, **fields).images
    return images


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def tokens_of(state: dict[str, Tensor], pooled: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(pooled, state["proj.0.weight"], state["proj.0.bias"]))
    flat = F.linear(hidden, state["proj.2.weight"], state["proj.2.bias"])
    return F.layer_norm(
        flat.unflatten(-1, (-1, tinydit.JOINT)), (tinydit.JOINT,), state["norm.weight"], state["norm.bias"]
    )


def by_hooks(pipe: Any, state: dict[str, dict[str, Tensor]], pooled: Tensor, scale: float) -> None:
    """The published adapter, from the formula alone."""
    tokens = tokens_of(state["image_proj"], pooled)
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    for n, block in enumerate(blocks):
        key = heads(F.linear(tokens, state["ip_adapter"][f"{n}.to_k_ip.weight"]))
        key = key / (key.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        value = heads(F.linear(tokens, state["ip_adapter"][f"{n}.to_v_ip.weight"]))
        _hook(block.attn, key, value, scale, double=n < DOUBLES)


def _hook(attn: Any, key: Tensor, value: Tensor, scale: float, *, double: bool) -> None:
    def term(states: Tensor) -> Tensor:
        query = attn.norm_q(attn.to_q(states).unflatten(-1, (HEADS, -1))).transpose(1, 2)
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        return scale * (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)

    def after(module: Any, args: Any, kwargs: dict[str, Tensor], out: Any) -> Any:
        extra = term(kwargs["hidden_states"])
        if not double:
            return out + extra
        return out[0] + F.linear(extra, attn.to_out[0].weight), out[1]

    attn.register_forward_hook(after, with_kwargs=True)


@pytest.mark.parametrize("scale", [0.7, 1.3, -0.4])
def test_it_is_the_published_formula(scale: float) -> None:
    state, pooled = tinydit.instantx_flux_state(DOUBLES + SINGLES), torch.randn(1, 24)
    pipe, oracle = tinydit.flux(), tinydit.flux()
    plain = call(pipe)
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.set_prompt(pooled, scale=scale)
    got = call(pipe)
    by_hooks(oracle, state, pooled, scale)
    assert (got - plain).abs().max() > 1e-2
    torch.testing.assert_close(got, call(oracle), atol=2e-5, rtol=1e-5)
    adapter.detach()
    assert torch.equal(call(pipe), plain)


def test_the_uncond_call_has_no_image_term() -> None:
    pipe = tinydit.flux()
    adapter = IPAdapter.from_state_dict(tinydit.instantx_flux_state(DOUBLES + SINGLES)).attach(pipe)
    adapter.set_prompt(torch.randn(1, 24), scale=0.7)
    acting = []
    processor = pipe.transformer.transformer_blocks[0].attn.processor
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda *_: acting.append(bool(processor.image_kvs))
    )
    call(pipe, true_cfg_scale=3.0)
    assert acting == [True, False] * 3


def test_a_mask_of_ones_and_a_compiled_transformers_own_change_nothing() -> None:
    """A single block's text reads the picture as well, unless a mask keeps it from some of the tokens."""
    pipe = tinydit.flux()
    adapter = IPAdapter.from_state_dict(tinydit.instantx_flux_state(DOUBLES + SINGLES)).attach(pipe)
    shown = torch.randn(1, 24)
    adapter.set_prompt(shown, scale=0.7, mask=torch.ones(5, 5))
    masked = call(pipe)
    adapter.set_prompt(shown, scale=0.7)
    wanted = call(pipe)
    torch.testing.assert_close(masked, wanted)
    pipe.transformer = torch.compile(pipe.transformer)
    with torch.compiler.set_stance("force_eager"):  # laid out for one graph, with masks that are 1 everywhere
        torch.testing.assert_close(call(pipe), wanted)


def test_each_sample_of_a_batch_has_its_mask_or_none() -> None:
    pipe = tinydit.flux()
    adapter = IPAdapter.from_state_dict(tinydit.instantx_flux_state(DOUBLES + SINGLES)).attach(pipe)
    half = torch.zeros(8, 12)
    half[:, :6] = 1
    shown = torch.randn(1, 24)
    prompts = [ImagePrompt(features=shown, scale=0.7, mask=mask) for mask in (None, half)]
    texts = tinydit.text(2)
    adapter.set_batch(prompts)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(2)]
    together = pipe(generator=seeds, **SIZE, **texts).images
    for i, prompt in enumerate(prompts):
        adapter.set_prompt(prompt)
        own = {name: value[i : i + 1] for name, value in texts.items()}
        alone = pipe(generator=torch.Generator().manual_seed(i), **SIZE, **own).images
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_mask_keeps_the_picture_out_of_text_and_the_other_half() -> None:
    pipe = tinydit.flux()
    adapter = IPAdapter.from_state_dict(tinydit.instantx_flux_state(DOUBLES + SINGLES)).attach(pipe)
    mask = torch.zeros(8, 12)
    mask[:, :6] = 1
    adapter.set_prompt(torch.randn(1, 24), scale=0.7, mask=mask)
    call(pipe)
    single = pipe.transformer.single_transformer_blocks[0].attn.processor
    ((kv,),) = (read.parts for read in single.image_kvs)
    assert kv.gain is not None
    lying = kv.gain[0, 0, :, 0]
    assert not lying[:7].any()  # the text tokens
    assert torch.allclose(lying[7:].unflatten(0, (8, 12)), 0.7 * mask)
