"""What image prompts cost: passes over all attention layers that read them, on inputs recorded in a real
step.

A whole step scatters by several percent on a busy machine, a pass over its attention layers by a thousandth
of a step. So each kind is timed as passes over the layers, interleaved with a second copy of the plain model
(the A/A control), in processor time; the difference to plain is given as a share of a plain step. Outputs are
compared first. Prints JSON.

    python benchmarks/layers.py [--model sd15|sdxl|emoji] [--size 32] [--dtype bfloat16] [--rounds 15]
                                [--tokens 16]
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

import imprompt
from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.adapter.ipadapter import IPAdapter

MODELS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
    },
}
EMOJI = Path(imprompt.__file__).parent / "assets" / "emoji"


class OneStep(DiffusionPipeline):
    """A pipeline of one guided step: image prompts find out from the pipeline that calls how a batch is laid
    out, and that its text stays the same."""

    do_classifier_free_guidance = True

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(
        self, sample: Tensor, text: Tensor, timestep: Tensor | int = 500, callback_on_step_end: None = None
    ) -> object:
        return self.unet(sample, timestep, text)


def unet_of(name: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet of a family with random weights (their values cost nothing), or the bundled one."""
    if name == "emoji":
        return UNet2DConditionModel.from_pretrained(EMOJI, subfolder="unet", torch_dtype=dtype).eval()
    torch.manual_seed(0)
    return UNet2DConditionModel(**MODELS[name]).to(dtype).eval()


def sharing(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy with attention processors of its own, and the very same weights."""
    return copy.deepcopy(unet, {id(weight): weight for weight in unet.parameters()})


def state_of(unet: UNet2DConditionModel) -> dict[str, dict[str, Tensor]]:
    """A random adapter in the published layout. Its projection to 4 tokens is not measured: tokens are
    given."""
    cross = unet.config.cross_attention_dim
    layers = {
        f"{site.index}.{part}.weight": torch.randn(site.width, cross) / cross**0.5
        for site in cross_attentions(unet)
        for part in ("to_k_ip", "to_v_ip")
    }
    proj = {"proj.weight": torch.randn(4 * cross, 1024) / 32, "proj.bias": torch.zeros(4 * cross)}
    norm = {"norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross)}
    return {"image_proj": proj | norm, "ip_adapter": layers}


def recorded(unet: UNet2DConditionModel, step: Callable[[], object]) -> list[tuple[str, Tensor, Tensor]]:
    """Name and inputs of every cross-attention in one step."""
    found: list[tuple[str, Tensor, Tensor]] = []
    handles = [
        unet.get_submodule(site.name).register_forward_pre_hook(
            lambda module, args, kwargs, name=site.name: found.append(
                (name, args[0], kwargs["encoder_hidden_states"])
            ),
            with_kwargs=True,
        )
        for site in cross_attentions(unet)
    ]
    step()
    for handle in handles:
        handle.remove()
    return found


def passes(
    unet: UNet2DConditionModel, inputs: list[tuple[str, Tensor, Tensor]]
) -> Callable[[], list[Tensor]]:
    layers = [(unet.get_submodule(name), states, text) for name, states, text in inputs]
    return lambda: [layer(states, encoder_hidden_states=text) for layer, states, text in layers]


def with_ours(
    unet: UNet2DConditionModel, sample: Tensor, text: Tensor, state: Any, count: int, tokens: int
) -> None:
    """Attach and show ``count`` prompts; the step builds their keys and values."""
    pipe = OneStep(unet, DDIMScheduler())
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    width = unet.config.cross_attention_dim
    masks = torch.eye(count)[:, :, None].expand(-1, -1, 4).reshape(count, -1, 1).expand(-1, -1, 16)
    adapter.set_prompt(
        [
            imprompt.ImagePrompt(
                tokens=torch.randn(tokens, width), negative=torch.randn(tokens, width), scale=0.6,
                mask=masks[i] if count > 1 else None,
            )
            for i in range(count)
        ]
    )  # fmt: skip
    pipe(sample, text)
    unet.keep = pipe, adapter  # as long as the model lives


def with_theirs(unet: UNet2DConditionModel, state: Any, count: int, length: int) -> None:
    """diffusers' own adapter: one image of the same number of tokens, or as many as there are prompts."""
    unet._load_ip_adapter_weights([state] * count)
    width = unet.config.cross_attention_dim
    tokens = [torch.randn(2, 1, length, width, dtype=unet.dtype) for _ in range(count)]
    masks = [torch.ones(1, 1, 64, 64, dtype=unet.dtype) for _ in range(count)] if count > 1 else None
    for site in cross_attentions(unet):
        attention = unet.get_submodule(site.name)
        attention.processor.to(unet.dtype)
        attention.processor.scale = [0.6] * count
        forward = attention.forward

        def called(states: Tensor, encoder_hidden_states: Tensor, forward: Any = forward) -> Tensor:
            extra = {} if masks is None else {"ip_adapter_masks": masks}
            out: Tensor = forward(states, encoder_hidden_states=(encoder_hidden_states, tokens), **extra)
            return out

        attention.forward = called


def measure(
    name: str, size: int, dtype: torch.dtype, rounds: int, counts: Sequence[int], tokens: int
) -> dict[str, float]:
    """Shares of a plain step, by kind."""
    plain = unet_of(name, dtype)
    text = torch.randn(2, 77, plain.config.cross_attention_dim, dtype=dtype)
    sample = torch.randn(2, plain.config.in_channels, size, size, dtype=dtype)

    def step(unet: UNet2DConditionModel) -> Callable[[], object]:
        return lambda: unet(sample, 500, text)

    state = state_of(plain)
    inputs = recorded(plain, step(plain))
    kinds: dict[str, Callable[[], list[Tensor]]] = {"plain": passes(plain, inputs)}
    kinds["plain again"] = passes(plain, inputs)
    for count in counts:
        label = "one prompt" if count == 1 else f"{count} masked"
        ours, theirs = sharing(plain), sharing(plain)
        with_ours(ours, sample, text, state, count, tokens)
        with_theirs(theirs, state, count, tokens)
        kinds[f"imprompt, {label}"] = passes(ours, inputs)
        kinds[f"diffusers, {label}"] = passes(theirs, inputs)
    for pass_ in kinds.values():
        assert all(out.isfinite().all() for out in pass_())
    whole = min(_seconds(step(plain)) for _ in range(2))
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        order = list(kinds) if number % 2 else list(reversed(kinds))
        for kind in order:
            times[kind].append(_seconds(kinds[kind]))
    base = times["plain"]
    found = {"step_cpu_ms": round(1000 * whole, 1)}
    for kind, taken in times.items():
        if kind != "plain":
            extra = statistics.median(one - two for one, two in zip(taken, base, strict=True))
            found[kind] = round(1 + extra / whole, 4)
    return found


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*MODELS, "emoji"], default="emoji")
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--prompts", type=int, nargs="*", default=[1, 8], help="image prompts; several: masked"
    )
    parser.add_argument("--tokens", type=int, default=4, help="of a prompt; a plus adapter has 16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        dtype = getattr(torch, args.dtype)
        found = measure(args.model, args.size, dtype, args.rounds, args.prompts, args.tokens)
    print(json.dumps({"model": args.model, "size": args.size, "dtype": args.dtype} | found, indent=2))


if __name__ == "__main__":
    main()
