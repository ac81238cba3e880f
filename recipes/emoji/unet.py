"""Stage 4: text encoder, UNet and the ``plus`` adapter (resampler, 16 tokens, the default) in one pass.

Nearly half of the draws go without the adapter, as a UNet is trained; of the others, half have a reference
that shares look, palette and background with the target and shows another thing, the text saying what
(sometimes more); in most others the picture speaks alone, and the target is the reference itself or the same
icon placed anew; in the rest its place is empty (guidance). ``adapters.py`` trains an adapter alone.

    python recipes/emoji/unet.py --minutes 100
"""

import torch
from adapters import TOKENS, export, features, new_adapter
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
from supply import Supply
from text import make_encoder
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from imprompt import IPAdapter


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


def main() -> None:
    parser = stage_parser(__doc__, minutes=40, lr=8e-4, batch=32)
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
    at = MODEL if (MODEL / "unet").exists() else START
    unet = UNet2DConditionModel.from_pretrained(at / "unet").float()
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    text = (
        CLIPTextModel.from_pretrained(at / "text_encoder").float() if at == MODEL else make_encoder(tokenizer)
    )
    encoder = CLIPVisionModelWithProjection.from_pretrained(MODEL / "image_encoder").float().eval().to(DEVICE)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().eval().to(DEVICE)
    unet, text = unet.to(DEVICE, memory_format=torch.channels_last), text.to(DEVICE)
    adapter = new_adapter("plus", unet, encoder)
    adapter.module.float().to(DEVICE)
    learners = nn.ModuleDict({"adapter": adapter.module, "unet": unet.train(), "text": text.train()})
    optimizer = adamw(adapter.module.parameters(), args.lr)
    words = [p for name, p in text.named_parameters() if "embedding" in name]
    layers = [p for name, p in text.named_parameters() if "embedding" not in name]
    rates = ((unet.parameters(), args.base_lr), (layers, args.text_lr), (words, args.word_lr))
    for parameters, rate in rates:
        for group in adamw(parameters, rate).param_groups:
            optimizer.add_param_group(group)
    bare = round(args.batch * args.bare)
    decouple(unet, adapter, bare)
    denoise = torch.compile(unet, dynamic=False) if args.compile else unet
    mark = fingerprint(stage="plus", base=True, groups=len(optimizer.param_groups))
    loop = Loop(
        CHECKPOINTS / "adapter-plus.pt", args.minutes, learners, optimizer,
        None if crew.rank else Ema(learners, 0.9995), mark, 200, crew=crew,
    )  # fmt: skip
    if not args.export:
        supply = Supply(vae, args.most, lambda p: features("plus", encoder, normalise(p)))
        abar = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(DEVICE)
        empty = torch.tensor(
            tokenizer("", padding="max_length", max_length=LENGTH)["input_ids"], device=DEVICE
        )
        with torch.no_grad():
            nothing = features("plus", encoder, torch.zeros(1, 3, 128, 128, device=DEVICE))
        blank = torch.zeros(bare, TOKENS["plus"], text.config.hidden_size, device=DEVICE)
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
    save_half(unet, MODEL / "unet")
    save_half(text, MODEL / "text_encoder")
    write_pipeline()
    print(f"wrote {export(adapter, 'plus')}")


if __name__ == "__main__":
    main()
