"""Stage 4: text encoder, UNet and the ``plus`` adapter (resampler, 16 tokens, the default) together; stage 5:
the ``base`` adapter (linear, 4 tokens) alone.

One pass serves the UNet and its adapter: nearly half of the draws go without the adapter, as a UNet is
trained; of the others, half have a reference that shares look, palette and background with the target and
shows another thing, the text saying what (sometimes more); in most others the picture speaks alone, and the
target is the reference itself or the same icon placed anew; in the rest its place is empty (guidance). Keys
and values of ``base`` start as those of ``plus``.

    python recipes/emoji/adapters.py plus --with-base --minutes 100
    python recipes/emoji/adapters.py base --minutes 20
"""

from pathlib import Path

import torch
from base import SCHEDULE, noised, timesteps, write_pipeline
from common import (
    CHECKPOINTS,
    DEVICE,
    MODEL,
    START,
    Crew,
    Ema,
    Loop,
    adamw,
    fingerprint,
    half,
    parsed,
    progress_mean,
    save_half,
    stage_parser,
)
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from encoder import normalise
from labels import LENGTH
from safetensors import safe_open
from safetensors.torch import save_file
from supply import Supply
from text import make_encoder
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from imprompt import IPAdapter

NAMES = {"base": "ip-adapter_emoji.safetensors", "plus": "ip-adapter-plus_emoji.safetensors"}
KINDS = {"base": "linear", "plus": "resampler"}
TOKENS = {"base": 4, "plus": 16}


def features(kind: str, encoder: CLIPVisionModelWithProjection, pixels: Tensor) -> Tensor:
    """What an adapter of ``kind`` reads of normalised pictures."""
    out = encoder(pixels, output_hidden_states=kind == "plus")
    return out.hidden_states[-2] if kind == "plus" else out.image_embeds


class Decoupled:
    """Attention over text and, for the rows behind the first ``bare``, over image tokens as well.

    Both come in one sequence, image tokens behind the caption's ``LENGTH``. imprompt's own processors add
    the same term, to the last bit; this one has nothing that changes from step to step, so that a compiled
    UNet stays compiled.
    """

    def __init__(self, key: nn.Linear, value: nn.Linear, bare: int) -> None:
        self.key, self.value, self.bare = key, value, bare

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor,
        attention_mask: None = None, temb: None = None,
    ) -> Tensor:  # fmt: skip
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        text, image = encoder_hidden_states[:, :LENGTH], encoder_hidden_states[self.bare :, LENGTH:]
        query = heads(attn.to_q(hidden_states))
        out = F.scaled_dot_product_attention(query, heads(attn.to_k(text)), heads(attn.to_v(text)))
        seen = F.scaled_dot_product_attention(
            query[self.bare :], heads(self.key(image)), heads(self.value(image))
        )
        out = torch.cat([out[: self.bare], out[self.bare :] + seen]).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def decouple(unet: UNet2DConditionModel, adapter: IPAdapter, bare: int) -> None:
    """Give every cross-attention layer the adapter's keys and values, numbered as published adapters are."""
    processors = dict(unet.attn_processors)
    for number, name in enumerate(processors):
        if "attn2" in name:
            site = adapter.module.get_submodule(f"ip_adapter.{number}")
            processors[name] = Decoupled(site.to_k_ip, site.to_v_ip, bare)
    unet.set_attn_processor(processors)


def export(adapter: IPAdapter, kind: str) -> Path:
    made = adapter.save_pretrained(CHECKPOINTS, f"{kind}.safetensors")
    path = MODEL / "adapters" / NAMES[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    with safe_open(made, "pt") as file:
        weights = {name: file.get_tensor(name).half().contiguous() for name in file.keys()}  # noqa: SIM118, not a dict
        save_file(weights, path, metadata=file.metadata())
    return path


def new_adapter(kind: str, unet: UNet2DConditionModel, encoder: CLIPVisionModelWithProjection) -> IPAdapter:
    """An adapter whose keys and values are those of the longest trained one that there is."""
    width = encoder.config.hidden_size if kind == "plus" else encoder.config.projection_dim
    adapter = IPAdapter.new(unet, kind=KINDS[kind], feature_width=width, tokens=TOKENS[kind])
    for folder in (MODEL, START):
        if (folder / "adapters" / NAMES["plus"]).exists():
            known = IPAdapter.from_pretrained(folder / "adapters" / NAMES["plus"]).module.state_dict()
            known = {name: value for name, value in known.items() if name.startswith("ip_adapter.")}
            adapter.module.load_state_dict(known, strict=False)
            break
    adapter.module.float().to(DEVICE)
    return adapter


def main() -> None:
    parser = stage_parser(__doc__, minutes=40, lr=8e-4, batch=32)
    parser.add_argument("kind", choices=sorted(NAMES))
    parser.add_argument("--with-base", action="store_true", help="UNet and text encoder learn too")
    parser.add_argument("--base-lr", type=float, default=2.5e-4)
    parser.add_argument("--text-lr", type=float, default=2.5e-4, help="of the text encoder's layers")
    parser.add_argument("--word-lr", type=float, default=5e-4, help="of its embeddings")
    parser.add_argument("--bare", type=float, default=0.45, help="part of the draws without an adapter")
    parser.add_argument("--most", type=int, default=60000, help="pictures to learn from")
    parser.add_argument("--processes", type=int, default=1, help="that train together")
    parser.add_argument("--compile", action="store_true", help="for a GPU: half the time a step")
    args = parsed(parser)
    crew = Crew(args.processes)
    torch.manual_seed(0)
    at = MODEL if not args.with_base or (MODEL / "unet").exists() else START
    unet = UNet2DConditionModel.from_pretrained(at / "unet").float()
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    text = (
        CLIPTextModel.from_pretrained(at / "text_encoder").float() if at == MODEL else make_encoder(tokenizer)
    )
    encoder = CLIPVisionModelWithProjection.from_pretrained(MODEL / "image_encoder").float().eval().to(DEVICE)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().eval().to(DEVICE)
    unet, text = unet.to(DEVICE, memory_format=torch.channels_last), text.to(DEVICE)
    adapter = new_adapter(args.kind, unet, encoder)
    learners = nn.ModuleDict({"adapter": adapter.module})
    optimizer = adamw(adapter.module.parameters(), args.lr)
    bare = 0
    if args.with_base:
        bare = round(args.batch * args.bare)
        learners.update({"unet": unet.train(), "text": text.train()})
        words = [p for name, p in text.named_parameters() if "embedding" in name]
        layers = [p for name, p in text.named_parameters() if "embedding" not in name]
        rates = ((unet.parameters(), args.base_lr), (layers, args.text_lr), (words, args.word_lr))
        for parameters, rate in rates:
            for group in adamw(parameters, rate).param_groups:
                optimizer.add_param_group(group)
    else:
        unet.eval().requires_grad_(False)
        text.eval().requires_grad_(False)
    decouple(unet, adapter, bare)
    denoise = torch.compile(unet, dynamic=False) if args.compile else unet
    mark = fingerprint(stage=args.kind, base=args.with_base, groups=len(optimizer.param_groups))
    loop = Loop(
        CHECKPOINTS / f"adapter-{args.kind}.pt", args.minutes, learners, optimizer,
        None if crew.rank else Ema(learners, 0.9995 if args.with_base else 0.999), mark, 200, crew=crew,
    )  # fmt: skip
    if not args.export:
        supply = Supply(vae, args.most, lambda p: features(args.kind, encoder, normalise(p)))
        abar = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(DEVICE)
        empty = torch.tensor(
            tokenizer("", padding="max_length", max_length=LENGTH)["input_ids"], device=DEVICE
        )
        with torch.no_grad():
            nothing = features(args.kind, encoder, torch.zeros(1, 3, 128, 128, device=DEVICE))
            if args.kind == "base":
                nothing = torch.zeros_like(nothing)
        blank = torch.zeros(bare, TOKENS[args.kind], text.config.hidden_size, device=DEVICE)
        for step in loop:
            if step % 250 == 0:
                supply.refresh()
            generator = torch.Generator(DEVICE).manual_seed(step * 16 + crew.rank)
            draws = supply.batch(bare, args.batch - bare, generator)
            assert supply.features is not None
            shown = supply.features[draws.references].float()
            shown = torch.where(draws.shown.view(-1, *[1] * (shown.ndim - 1)), shown, nothing)
            t = timesteps(args.batch)
            noisy, target = noised(supply.latents[draws.targets].float(), t, abar)
            with half():
                hidden = text(supply.captions(draws, empty)).last_hidden_state
                tokens = torch.cat([blank, adapter.projection(shown).float()])
                states = torch.cat([hidden.float(), tokens], 1)
                out = denoise(noisy, t, states, return_dict=False)[0]
            loss = F.mse_loss(out.float(), target)
            loop.learn(loss)
            progress_mean(loop.log, "loss", loss)
            if step % 100 == 0 and not torch.isfinite(loss.detach()):
                raise SystemExit(f"the loss is {loss.detach()} at step {step}: lower the rates")
    if crew.rank:
        return
    assert loop.ema
    loop.ema.copy_to(learners)
    if args.with_base:
        save_half(unet, MODEL / "unet")
        save_half(text, MODEL / "text_encoder")
        write_pipeline()
    print(f"wrote {export(adapter, args.kind)}")


if __name__ == "__main__":
    main()
