"""The text's keys and values are computed once a generation, and anew whenever they could be others."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.packed import pack, works
from imprompt.schema.prompt import ImagePrompt
from tiny import POOLED, TEXT_WIDTH, random_adapter_state, tiny_kolors, tiny_sd, tiny_sdxl

STEPS = 4


class Products(TorchDispatchMode):
    """Counts products of matrices with one of these weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights, self.count = {weight.data_ptr() for weight in weights}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.linear):
            self.count += args[1].data_ptr() in self.weights
        return func(*args, **(kwargs or {}))


def prompted(make: Callable[[], Any] = tiny_sd) -> Any:
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    pipe.adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet)).attach(pipe)
    pipe.adapter.set_prompt(ImagePrompt(features=torch.ones(1, POOLED)))
    return pipe


def anew(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A step callback that changes nothing: beside one, nothing is kept."""
    return {}


def draw(pipe: Any, prompt: str = "a cat", steps: int = STEPS, **options: Any) -> Tensor:
    return pipe(
        prompt, num_inference_steps=steps, width=32, height=32, output_type="latent", guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0), **options,
    )[0]  # fmt: skip


def test_text_is_projected_once_a_generation() -> None:
    pipe = prompted()
    names = ("attn2.to_k.weight", "attn2.to_v.weight")
    layers = [weight for name, weight in pipe.unet.named_parameters() if name.endswith(names)]

    def projections(**options: Any) -> int:
        with Products(layers) as seen:
            draw(pipe, **options)
        return seen.count

    assert projections() == len(layers)
    assert projections(callback_on_step_end=anew) == len(layers) * STEPS


@pytest.mark.skipif(not works(torch.bfloat16), reason="this processor or PyTorch lacks the kernels")
def test_packed_layers_project_the_text_once_too() -> None:
    pipe = prompted()
    pipe.to(torch.bfloat16)
    pack(pipe.unet)
    layers = [each for name, each in pipe.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    ran: list[Any] = []
    hook = register_module_forward_hook(lambda layer, *_: ran.append(layer))
    with torch.inference_mode():
        draw(pipe)
    hook.remove()
    assert sorted(map(id, layers)) == sorted(id(each) for each in ran if each in layers)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_kolors])
@pytest.mark.parametrize("inference", [False, True])
def test_the_picture_is_bit_for_bit_the_same(make: Callable[[], Any], inference: bool) -> None:
    if make is tiny_kolors:
        pytest.importorskip("sentencepiece")
    pipe = prompted(make)
    with torch.inference_mode(inference):
        kept, computed = draw(pipe), draw(pipe, callback_on_step_end=anew)
    assert torch.equal(kept, computed)


def test_weights_that_were_written_past_torchs_count_act_in_the_next_generation() -> None:
    """As when a LoRA is fused: ``weight.data`` is changed, the parameter and its version stay."""
    pipe = prompted()
    before = draw(pipe)
    for name, weight in pipe.unet.named_parameters():
        if "attn2.to_k" in name:
            weight.data += 0.5
    kept = draw(pipe)
    assert not torch.equal(kept, before)
    assert torch.equal(kept, draw(pipe, callback_on_step_end=anew))


def test_weights_changed_between_steps_act_at_the_next_step() -> None:
    def between_steps(pipe: StableDiffusionPipeline, change: Callable[[], None]) -> Tensor:
        step, done = pipe.scheduler.step, []

        def changed(*args: Any, **kwargs: Any) -> Any:
            done.append(1)
            if len(done) == 2:
                change()
            return step(*args, **kwargs)

        pipe.scheduler.step = changed
        return draw(pipe)

    kept, computed = prompted(), prompted()

    def scale(pipe: StableDiffusionPipeline) -> None:
        with torch.no_grad():
            pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight.mul_(3)

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 1:
            scale(pipe)
        return {}

    assert torch.equal(
        between_steps(kept, lambda: scale(kept)), draw(computed, callback_on_step_end=callback)
    )


def test_a_users_lora_acts_at_its_scale() -> None:
    peft = pytest.importorskip("peft")
    pipe = prompted()
    before = draw(pipe)
    torch.manual_seed(1)
    pipe.unet.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False), "mine"
    )
    with_lora = draw(pipe)
    assert not torch.equal(with_lora, before)
    assert torch.equal(with_lora, draw(pipe, callback_on_step_end=anew))
    assert torch.equal(draw(pipe, cross_attention_kwargs={"scale": 0.0}), before)


def test_another_text_is_read_whether_it_is_another_object_or_written_to() -> None:
    pipe = prompted()
    random = torch.Generator().manual_seed(2)
    one, two = (torch.randn(1, 77, TEXT_WIDTH, generator=random) for _ in range(2))

    def drawn(text: Tensor) -> Tensor:
        options = {"prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text)}
        return draw(pipe, None, **options)

    first, second = drawn(one), drawn(two)
    one.copy_(two)
    assert not torch.equal(first, second)
    assert torch.equal(drawn(one), second)


def test_a_text_that_changes_from_step_to_step_is_read_at_each() -> None:
    """A pipeline that puts its text together at each step, half of the steps with another."""

    class Alternating(StableDiffusionPipeline):
        @torch.no_grad()
        def __call__(self, texts: list[Tensor], callback_on_step_end: Any = None) -> Tensor:
            self.scheduler.set_timesteps(len(texts))
            latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
            for t, text in zip(self.scheduler.timesteps, texts, strict=True):
                latents = self.scheduler.step(self.unet(latents, t, text).sample, t, latents).prev_sample
            return latents

        do_classifier_free_guidance = False

    pipe = prompted(lambda: Alternating(**tiny_sd().components, requires_safety_checker=False))
    one, two = torch.zeros(1, 77, TEXT_WIDTH), torch.ones(1, 77, TEXT_WIDTH)
    texts = [one, two, one, one.clone()]
    assert torch.equal(pipe(texts), pipe(texts, callback_on_step_end=anew))
    assert not torch.equal(pipe(texts), pipe([one] * 4))


def test_nothing_is_kept_after_the_generation() -> None:
    pipe = prompted()
    draw(pipe)
    gc.collect()
    length = pipe.tokenizer.model_max_length
    rows = [each for each in gc.get_objects() if isinstance(each, Tensor) and each.ndim == 4]
    assert not [each for each in rows if each.shape[2] == length]
