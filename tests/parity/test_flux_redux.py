"""FLUX Redux on tiny FLUX pipelines, against diffusers' own prior and pipelines with a longer text."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors.torch import save_file
from torch import Tensor

import tinydit
from compiled import check_one_graph
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.clip import ImageEncoder
from imprompt.errors import AdapterMismatch, EncoderMismatch, UsageError
from imprompt.generation.engine import Engine
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import Request
from tiny import picture, tiny_sd

STEPS = {"num_inference_steps": 3, "output_type": "latent", "height": 32, "width": 48}


def draw(pipe: Any, rows: int = 1, **fields: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(rows)]
    images: Tensor = pipe(generator=generators, **STEPS | tinydit.text(rows) | fields).images
    return images


def embedder() -> ReduxImageEncoder:
    """diffusers' own projection, with the tiny adapter's weights."""
    made = ReduxImageEncoder(redux_dim=24, txt_in_features=tinydit.JOINT)
    made.load_state_dict(tinydit.redux_state())
    return made.eval()


def redux(*seeds: int) -> Tensor:
    """The tokens of pictures, one picture after the other, as diffusers' prior makes them."""
    pixels = tinydit.siglip_processor()(images=[picture(s) for s in seeds], return_tensors="pt").pixel_values
    with torch.no_grad():
        made = embedder()(tinydit.siglip()(pixels).last_hidden_state)
    tokens: Tensor = made.image_embeds.flatten(0, 1)[None]
    return tokens


def longer(*tokens: Tensor) -> dict[str, Tensor]:
    """The text with ``tokens`` behind it."""
    return {"prompt_embeds": torch.cat([tinydit.text()["prompt_embeds"], *tokens], 1)}


def ours(pipe: Any) -> IPAdapter:
    encoder = ImageEncoder(tinydit.siglip(), tinydit.siglip_processor())
    state = {"image_proj": tinydit.redux_state(), "ip_adapter": {}}
    return IPAdapter.from_state_dict(state, image_encoder=encoder).attach(pipe)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_request_draws_what_diffusers_prior_and_pipeline_draw(tmp_path: Path) -> None:
    base = tinydit.save_base("flux", tmp_path / "flux")
    folder = tmp_path / "redux"
    side = 160  # 400 tokens, to count for something beside T5's 512
    encoder, processor = tinydit.siglip(side), tinydit.siglip_processor(side)
    encoder.save_pretrained(folder / "image_encoder")
    processor.save_pretrained(folder / "feature_extractor")
    save_file(tinydit.redux_state(), folder / "flux1-redux-dev.safetensors")
    pipe = diffusers.FluxPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    texts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    prior = diffusers.FluxPriorReduxPipeline(
        image_encoder=encoder,
        feature_extractor=processor,
        image_embedder=embedder(),
        **{name: pipe.components[name] for name in texts},
    )
    shown = picture(1)
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "width": 48, "height": 32}
    wanted = pipe(**prior(shown, prompt="a cat"), generator=torch.Generator().manual_seed(5), **call).images[
        0
    ]
    request = Request(
        prompt="a cat", base=str(base), adapter=str(folder), images=[ImagePrompt("shown", scale=1.0)],
        steps=3, guidance=3.0, size=(48, 32), seed=5,
    )  # fmt: skip
    engine = Engine()

    def drawn(request: Request) -> np.ndarray:
        result = engine.run(request, pictures={"shown": shown})
        assert not result.notes
        return np.asarray(result.images[0], np.int16)

    got = drawn(request)
    assert np.abs(got - np.asarray(wanted, np.int16)).max() <= 1
    plain = drawn(request.replace(images=(), adapter=None))
    assert np.abs(got - plain).max() > 3
    assert np.array_equal(plain, drawn(request.replace(images=[ImagePrompt("shown", scale=0.0)])))
    with pytest.raises(UsageError, match=r"explain: the base reads the tokens of adapter '.*' among"):
        engine.run(request, pictures={"shown": shown}, explain=True)


def test_its_tokens_are_more_text() -> None:
    pipe = tinydit.flux()
    plain = draw(pipe)
    adapter = ours(pipe)
    assert torch.equal(draw(pipe), plain)
    adapter.set_prompt(picture(1))
    one = draw(pipe)
    adapter.set_prompt([picture(1), picture(2)])
    two = draw(pipe)
    adapter.set_prompt([ImagePrompt(picture(1)), ImagePrompt(picture(2))])
    added = draw(pipe)
    adapter.set_prompt(picture(1), scale=0.0)
    assert torch.equal(draw(pipe), plain)
    adapter.detach()
    assert torch.equal(draw(pipe), plain)
    close(one, draw(pipe, **longer(redux(1))))
    close(two, draw(pipe, **longer(redux(1, 2))))
    close(added, two)
    assert (one - plain).abs().max() > 1e-2
    assert (two - one).abs().max() > 1e-2


def test_scale_two_is_the_picture_shown_twice_and_others_a_bias() -> None:
    """Twice the same token in a softmax is one with log(2) more."""
    pipe = tinydit.flux()
    adapter = ours(pipe)
    adapter.set_prompt(picture(1), scale=2.0)
    twice = draw(pipe)
    adapter.set_prompt(picture(1), scale=0.3)
    weaker = draw(pipe)
    adapter.detach()
    close(twice, draw(pipe, **longer(redux(1), redux(1))))
    text, tokens, image = 7, redux(1).shape[1], 8 * 12
    bias = torch.zeros(1, 1, 1, text + tokens + image)
    bias[..., text : text + tokens] = torch.tensor(0.3).log()
    close(weaker, draw(pipe, **longer(redux(1)), joint_attention_kwargs={"attention_mask": bias}))


def test_the_negative_call_reads_the_negative_text_alone() -> None:
    pipe = tinydit.flux()
    guided = {"true_cfg_scale": 3.0, **tinydit.negative()}
    adapter = ours(pipe)
    adapter.set_prompt(picture(1), scale=1.0)
    got = draw(pipe, **guided)
    adapter.detach()
    forward, calls = pipe.transformer.forward, []

    def longer_first(**call: Any) -> Any:
        calls.append(call["encoder_hidden_states"].shape[1])
        if len(calls) % 2:
            call["encoder_hidden_states"] = torch.cat([call["encoder_hidden_states"], redux(1)], 1)
            call["txt_ids"] = torch.zeros(call["encoder_hidden_states"].shape[1], 3)
        return forward(**call)

    pipe.transformer.forward = longer_first
    close(got, draw(pipe, **guided))
    assert calls == [7] * 6


def test_guidance_of_the_images_own() -> None:
    pipe = tinydit.flux()
    plain = draw(pipe)
    adapter = ours(pipe)
    adapter.set_prompt(picture(1))
    ordinary = draw(pipe)
    adapter.set_guidance(1.0)
    close(draw(pipe), ordinary)
    adapter.set_guidance(0.0)
    close(draw(pipe), plain)


def left() -> Tensor:
    mask = torch.zeros(8, 12)
    mask[:, :6] = 1
    return mask


def first_block(pipe: Any, **fields: Any) -> list[Tensor]:
    """What the first double block's attention adds to each of the image's tokens, in every step."""
    found: list[Tensor] = []
    attention = pipe.transformer.transformer_blocks[0].attn
    handle = attention.register_forward_hook(lambda module, args, out: found.append(out[0].clone()))
    try:
        draw(pipe, **fields)
    finally:
        handle.remove()
    return found


def test_a_mask_keeps_the_picture_to_its_place() -> None:
    pipe = tinydit.flux()
    plain = first_block(pipe)[0].unflatten(1, (8, 12))
    adapter = ours(pipe)
    adapter.set_prompt(picture(1))
    whole, drawn = first_block(pipe)[0].unflatten(1, (8, 12)), draw(pipe)
    adapter.set_prompt(picture(1), mask=torch.ones(5, 5))
    close(draw(pipe), drawn)
    adapter.set_prompt(picture(1), mask=left())
    masked = first_block(pipe)[0].unflatten(1, (8, 12))
    close(masked[:, :, 6:], plain[:, :, 6:])
    close(masked[:, :, :6], whole[:, :, :6])
    assert (masked[:, :, :6] - plain[:, :, :6]).abs().max() > 1e-3


def test_a_window_is_a_share_of_the_steps() -> None:
    pipe = tinydit.flux()
    plain = first_block(pipe)
    adapter = ours(pipe)
    adapter.set_prompt(picture(1), start=0.3)
    late = first_block(pipe)
    close(late[0], plain[0])
    assert all((one - other).abs().max() > 1e-4 for one, other in zip(late[1:], plain[1:], strict=True))


def test_a_batch_shows_each_sample_its_own_pictures() -> None:
    pipe = tinydit.flux()
    adapter = ours(pipe)
    samples = [
        ImagePrompt([picture(1), picture(3)], weights=[1.0, 0.5], scale=0.8),
        None,
        ImagePrompt(picture(2), mask=left(), end=0.7),
    ]
    adapter.set_batch(samples)
    together = draw(pipe, 3)
    for i, prompt in enumerate(samples):
        adapter.clear_prompt() if prompt is None else adapter.set_prompt(prompt)
        texts = {name: value[i : i + 1] for name, value in tinydit.text(3).items()}
        alone = pipe(generator=torch.Generator().manual_seed(i), **STEPS, **texts).images
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_it_acts_beside_other_adapters_and_on_kontext() -> None:
    pipe = tinydit.flux(diffusers.FluxKontextPipeline)
    fields = {"image": picture(3), "_auto_resize": False, "max_area": 32 * 48}
    other = IPAdapter.from_state_dict(tinydit.instantx_flux_state()).attach(pipe)
    other.set_prompt(torch.randn(1, 24, generator=torch.Generator().manual_seed(1)), scale=0.7, mask=left())
    alone = draw(pipe, **fields)
    adapter = ours(pipe)
    adapter.set_prompt(picture(1), mask=left())
    both = draw(pipe, **fields)
    other.detach()
    assert (both - alone).abs().max() > 1e-3
    assert (both - draw(pipe, **fields)).abs().max() > 1e-3


def test_what_it_cannot_do_is_said_in_one_line() -> None:
    pipe = tinydit.flux()
    adapter = ours(pipe)
    for fields, said in (
        ({"profile": [0.3, 0.9]}, "profile: .* has no effect on adapter"),
        ({"scaling": "k+v"}, "scaling: 'k.v' has no effect on adapter"),
        ({"scale": -0.5}, "scale: a negative strength has no effect on adapter"),
        ({"curve": "0:1,1:-1"}, "scale: a negative strength has no effect on adapter"),
    ):
        with pytest.raises(UsageError, match=said):
            adapter.set_prompt(picture(1), **fields)
    with pytest.raises(EncoderMismatch, match="needs last features of width 24"):
        adapter.prompt_encoder.use(ImageEncoder(tinydit.clip(), tinydit.clip_processor()))
    adapter.detach()
    for target, name in ((tinydit.chroma(), "ChromaTransformer2DModel"), (tiny_sd(), "UNet")):
        with pytest.raises(AdapterMismatch, match=name):
            adapter.attach(target)


@pytest.mark.slow
@pytest.mark.xdist_group("compiled")
def test_a_compiled_transformer_compiles_nothing_anew_for_another_prompt() -> None:
    check_one_graph("test_flux_redux", "draw", '({"scale": 0.2}, {}, {"mask": left()}, {"start": 0.3})')
