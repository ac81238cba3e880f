"""Stage 5: the two adapters on the frozen base, made by ``imprompt.training`` like anyone's own.

``linear`` (4 tokens of the pooled embedding) becomes ``ip-adapter_emoji``, ``resampler`` (16 of the hidden
states) ``ip-adapter-plus_emoji``. The reference is the target itself, cropped, moved, turned and tinted anew
in each of its cached versions; or the same concept in another style, where the caption must say the style;
or another concept in the same style, where the caption must say the concept. So the adapter learns to leave
to the words what the words say. Without words the reference is always the target itself.

Beside the vocabulary, whose words the base knows, it sees pictures of all everyday concepts: an adapter that
was shown seventy concepts would read every picture as one of them. Of those only the style is said.

Before that, the projection alone learns to say of a picture what the text encoder says of its caption, as the
text's keys and values see it, which are where the adapter's own begin. That takes a minute, since no UNet
runs, and stands for what hundreds of thousands of steps would otherwise have to find: after 1,000 steps
without it the image explained 1.5 % of the held-out loss, and drawings had nothing of their reference.

What comes of that draws a picture shown alone best, and talks over a text; a thousand steps on the UNet teach
it to leave the concept to the text, and cost some of what it drew alone (12 held-out pairs known again: 67 %
before, 42 % after). So one adapter of each is kept: ``linear`` with ``--steps 0``, ``resampler`` with 1,100.

    python recipes/emoji/adapters.py linear|resampler [--steps N] [--minutes M]

A run that was interrupted, or whose minutes were over, goes on when it is started again.
"""

import argparse
import json
from pathlib import Path

import torch
from common import DATA, MODEL, RUNS, Row, cosine, load_pictures, load_rows
from data import hashed
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from unet import Captions

from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.data.rows import read_dataset
from imprompt.encoders.clip import ImageEncoder
from imprompt.training import TrainConfig, train
from imprompt.training.cache import ClipFeatures, encode_features

NAMES = {"linear": "ip-adapter_emoji.safetensors", "resampler": "ip-adapter-plus_emoji.safetensors"}


def rows_of(vocabulary: str, beside: str, often: int, most: int) -> str:
    """The rows of a vocabulary, held-out ones included (for validation), ``often`` times each, and trained
    ones of ``beside``, at most ``most`` of them, with their style as the only caption, as a file that
    training reads."""
    known = load_rows(vocabulary, split=None)
    words = {row["groups"]["concept"] for row in known}
    lines = [json.dumps(row) for row in known for _ in range(often if row["split"] == "train" else 1)]
    others = [row for row in load_rows(beside) if row["groups"]["concept"] not in words]
    for row in sorted(others, key=lambda row: hashed(row["file_name"]))[:most]:
        lines.append(json.dumps(row | {"captions": {"style": row["captions"]["style"]}}))
    path, text = DATA / f"{vocabulary}-{beside}.jsonl", "".join(line + "\n" for line in lines)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return str(path)


def seen_by(unet: UNet2DConditionModel, adapter: IPAdapter | None = None) -> Tensor:
    """How the UNet's keys and values, or an adapter's, see a token (C×C): the squared length of ``x @ seen``
    is that of all of them."""
    weights = []
    for layer in cross_attentions(unet):
        text = unet.get_submodule(layer.name)
        pair = (text.to_k, text.to_v) if adapter is None else adapter.key_value(layer.index)
        weights += [part.weight.detach().float() for part in pair]
    metric = sum((w.T @ w / len(w) for w in weights), torch.zeros(()))
    values, vectors = torch.linalg.eigh(metric / metric.diagonal().mean())
    return vectors * values.clamp_min(0).sqrt()


@torch.no_grad()
def take_out_no_words(adapter: IPAdapter, unet: UNet2DConditionModel, states: Tensor, empty: Tensor) -> None:
    """Change the adapter's values so that a picture alone says what its caption would alone.

    Beside a picture the UNet also reads its text, and no words say something too: nearly the same at every
    place, hence a constant of each layer, measured here. It is taken out of every token's value along a
    direction in which all caption states are nearly equal.
    """
    flat = states.flatten(0, 1)
    # A short direction (ridge), nearly as even: along the exact one, 2,000 times as long, any error of the
    # projection's would be blown up.
    ridge = flat.T @ flat + 0.05 * len(flat) * torch.eye(flat.shape[1])
    ones = torch.linalg.solve(ridge, flat.sum(0))
    means: dict[str, list[Tensor]] = {}
    hooks = []
    for layer in cross_attentions(unet):

        def keep(_: object, args: tuple[Tensor, ...], name: str = layer.name) -> None:
            means.setdefault(name, []).append(args[0].mean((0, 1)))

        hooks.append(unet.get_submodule(layer.name).to_out[0].register_forward_pre_hook(keep))
    generator = torch.Generator().manual_seed(0)
    for t in (950, 800, 650, 500, 350, 200):
        unet(torch.randn(4, 4, 16, 16, generator=generator), t, empty.expand(4, -1, -1))
    for hook in hooks:
        hook.remove()
    for layer in cross_attentions(unet):
        _, to_v = adapter.key_value(layer.index)
        to_v.weight -= torch.stack(means[layer.name]).mean(0)[:, None] * ones[None]
    print(
        f"no words taken out; equal to {float((flat @ ones - 1).abs().max()):.1e} in all tokens", flush=True
    )


def few(states: Tensor, hidden_ends: Tensor) -> Tensor:
    """Four of a caption's states (N, 16, C): start, the concept's word, the style's, and the end."""
    rows = torch.arange(len(states))
    ends = hidden_ends.clamp(3)
    return torch.stack([states[:, 0], states[rows, ends // 2], states[rows, ends - 2], states[rows, ends]], 1)


def said_of(rows: list[Row], shortly: bool) -> Tensor:
    """States of each row's caption (1+N, 16 or 4, C), those of no words first. A thing that is not of the
    vocabulary is called what it looks like in its own style, see :class:`clip.Likeness`."""
    from clip import Likeness, looks, spoken

    near = load_rows("small")
    words, styles = (sorted({row["groups"][kind] for row in near}) for kind in ("concept", "style"))
    texts, captions = spoken(near, styles, words)
    hidden = captions[["", *texts]]
    if shortly:  # the end is the first of the states that pad; a caption's words lie before it
        hidden = few(hidden, torch.tensor([captions.ends[text] for text in ["", *texts]]))
    table = hidden[1:].unflatten(0, (len(words), len(styles)))
    likeness = Likeness(
        load_pictures(near), torch.tensor([words.index(row["groups"]["concept"]) for row in near])
    )
    states = [hidden[:1]]
    for i in tqdm(range(0, len(rows), 64), "likeness", leave=False, disable=None):
        chunk = rows[i : i + 64]
        shares = likeness(likeness.looks(*looks(load_pictures(chunk).float())))
        for row, share in zip(chunk, shares, strict=True):
            word, style = row["groups"]["concept"], styles.index(row["groups"]["style"])
            own = F.one_hot(torch.tensor(words.index(word)), len(words)).float() if word in words else share
            states.append(torch.einsum("c,ctd->td", own, table[:, style])[None])
    return torch.cat(states)


def from_captions(kind: str, config: TrainConfig, steps: int, batch: int = 48) -> str:
    """The file of an adapter whose projection says of pictures what their captions say; made once."""
    path = RUNS / f"captions-{kind}.safetensors"
    if path.exists():
        return str(path)
    rows = read_dataset(config.data).rows
    feature = {"linear": "pooled", "resampler": "hidden"}[kind]
    encoder = ImageEncoder.from_pretrained(str(MODEL / "image_encoder"), torch_dtype=torch.float32)
    reader = ClipFeatures(encoder, feature)
    table = encode_features(rows, reader, config, [(128, 128)] * len(rows))
    negative = reader.negative()[feature]
    names = {row.name for row in rows}
    everything = load_rows("all", None)
    records: dict[str, Row] = {row["file_name"]: row for row in everything if row["file_name"] in names}
    states = said_of([records[row.name] for row in rows], kind == "linear")
    unet = UNet2DConditionModel.from_pretrained(MODEL / "unet").float()
    adapter = IPAdapter.new(unet, kind=kind, image_encoder=encoder)
    take_out_no_words(adapter, unet, states, Captions([])[[""]])
    seen = seen_by(unet, adapter)
    parameters = list(adapter.projection.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    training = [index for index, row in enumerate(rows) if row.trainable]
    half = torch.cpu._is_avx512_bf16_supported()
    with tqdm(range(steps), f"{kind} from captions", mininterval=5) as bar:
        for step in bar:
            generator = torch.Generator().manual_seed(step)
            picked = torch.randint(len(training), (batch,), generator=generator).tolist()
            indices = [training[place] for place in picked]
            views = torch.randint(config.views, (batch,), generator=generator).tolist()
            features = torch.cat([negative, table.rows(feature, indices, views)])
            target = states[[0, *(index + 1 for index in indices)]]
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                tokens = adapter.projection(features)
            loss = F.mse_loss(tokens.float() @ seen, target @ seen)
            optimizer.param_groups[0]["lr"] = 2e-3 * cosine(step, steps, 50)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % 50 == 0:
                spread = ((target - target.mean(0)) @ seen).square().mean()
                bar.set_postfix(left=f"{float(loss.detach() / spread):.3f}")
    adapter.save_pretrained(path.parent, path.name)
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=sorted(NAMES))
    parser.add_argument("--steps", type=int, default=3000, help="of the adapter on the UNet; 0: none")
    parser.add_argument("--first-steps", type=int, default=1200, help="of the projection, on captions")
    parser.add_argument("--minutes", type=float, default=None, help="end after so long; start again to go on")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--views", type=int, default=4, help="cached versions of each reference")
    parser.add_argument("--sample-every", type=int, default=1000)
    parser.add_argument("--vocabulary", default="small")
    parser.add_argument("--beside", default="core", help="where pictures of other concepts are taken from")
    parser.add_argument("--most", type=int, default=1500, help="pictures of other concepts")
    parser.add_argument("--often", type=int, default=5, help="how often the vocabulary comes in an epoch")
    parser.add_argument("--name", default=None, help="folder of this run inside runs/")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = TrainConfig.checked({
        "data": rows_of(args.vocabulary, args.beside, args.often, args.most),
        "base": str(MODEL), "kind": args.kind,
        "output": RUNS / (args.name or f"adapter-{args.kind}"), "cache": RUNS / "adapter-cache",
        "resume": True, "init": None, "steps": max(1, args.steps), "minutes": args.minutes,
        "batch": args.batch, "lr": args.lr, "schedule": "cosine", "warmup": min(50, args.steps // 10),
        "ema": 0.997,
        "betas": (0.9, 0.98), "latent": "mean",
        "references": (("self", 0.4), ("concept", 0.2), ("style", 0.4)),
        "captions": {
            "self": ("full", "concept", "style"), "concept": ("style", "full"), "style": ("concept",),
        },
        "drop_text": 0.4, "drop_image": 0.05, "drop_both": 0.05, "views": args.views,
        "log_every": 50, "validate_every": 500, "validation_rows": 48, "checkpoint_every": 100,
        "sample_every": args.sample_every, "device": "cpu",
    })  # fmt: skip
    path: str | Path = from_captions(args.kind, config, args.first_steps)
    if args.steps:
        path = train(config.model_copy(update={"init": path}))
    (MODEL / "adapters").mkdir(exist_ok=True)
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name).half() for name in file.keys()}  # noqa: SIM118, not a dict
        save_file(weights, MODEL / "adapters" / NAMES[args.kind], metadata=file.metadata())
    print(f"wrote {MODEL / 'adapters' / NAMES[args.kind]}")


if __name__ == "__main__":
    main()
