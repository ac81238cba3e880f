"""Stage 3: tokenizer, text encoder and image encoder, trained together by contrast (CLIP, SigLIP's loss).

A word-piece vocabulary is learned from the captions; ``CLIPTextModel`` (width 256, four layers) becomes the
base model's text encoder, ``CLIPVisionModelWithProjection`` (width 256, patch 16 on 128×128) the adapters'
image encoder. Each picture is matched with a caption of its concept and style; augmentation (crop, shift,
scale, colour) keeps a thousand pictures from being memorised. A caption fits every picture it is true of, so
the loss is SigLIP's pairwise one with several positives (Zhai et al. 2023), not a softmax over the batch.

A second stage then trains the image tower alone, on the pictures of *every* concept, against the locked
text tower (Zhai et al. 2022, LiT) and two auxiliary classifiers that are thrown away (concept, style), with
half of the patches left out (Li et al. 2023, FLIP). It lets adapters read pictures no training saw.

A third stage, after the UNet's, makes sure that what the base can be told is what can be read off a picture:
the image tower, with a linear layer that is thrown away, learns to say the states of the picture's caption as
the UNet's keys and values see them. Its embedding is what adapters then start from (``adapters.py``).

    python recipes/emoji/clip.py
    python recipes/emoji/clip.py --vision-only
    python recipes/emoji/clip.py --captions --minutes 9
"""

import argparse
import json
import math
import random

import torch
from common import MODEL, RUNS, Ema, Loop, Row, load_pictures, load_rows, progress_mean
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

LENGTH = 16
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def make_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's file format, learned from every caption of the data."""
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_pattern(), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=3000, min_frequency=2, end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
    )  # fmt: skip
    texts = [text for row in load_rows("all", None) for kind in row["captions"].values() for text in kind]
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in model["merges"]]
    # CLIP spells every byte twice, bare and as the end of a word; those a caption never ended in are added.
    vocab = dict(model["vocab"])
    for symbol in pre_tokenizers.ByteLevel.alphabet():
        vocab.setdefault(symbol + "</w>", len(vocab))
    folder = MODEL / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    made = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)
    made.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def _pattern():  # type: ignore[no-untyped-def]
    from tokenizers import Regex

    return Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


def text_model(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=256,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def vision_model() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=256, intermediate_size=768, num_hidden_layers=5, num_attention_heads=4,
            image_size=128, patch_size=16, projection_dim=256,
        )
    )  # fmt: skip


def normalise(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) to the encoder's input."""
    return (images.float() / 255 - MEAN) / STD


def augment(images: Tensor) -> Tensor:
    """Random scale, shift, flip and colour, on white; uint8 in, float 0…255 out. One draw a picture."""
    n = len(images)
    scale = torch.empty(n).uniform_(0.75, 1.25)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, 0, 0] *= torch.where(torch.rand(n) < 0.3, -1.0, 1.0)
    theta[:, :, 2] = torch.empty(n, 2).uniform_(-0.2, 0.2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # Sampled as distance from white, so that what lies outside the picture is white.
    moved = 255 - F.grid_sample(255 - images.float(), grid, align_corners=False)
    gain = torch.empty(n, 3, 1, 1).uniform_(0.92, 1.08) * torch.empty(n, 1, 1, 1).uniform_(0.9, 1.1)
    return (moved * gain).clamp(0, 255)


class Contrast(nn.Module):
    def __init__(self, text: CLIPTextModel, vision: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.text, self.vision = text, vision
        self.text_projection = nn.Linear(256, 256, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-4.0))


def draw(row: Row) -> tuple[str, tuple[str | None, str | None]]:
    """A caption and what it claims: (concept or None, style or None)."""
    kind = random.choices(["full", "concept", "style"], [0.7, 0.2, 0.1])[0]
    concept = row["groups"]["concept"] if kind != "style" else None
    style = row["groups"]["style"] if kind != "concept" else None
    return random.choice(row["captions"][kind]), (concept, style)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--vocabulary", default="small")
    parser.add_argument("--vision-only", action="store_true", help="the second stage")
    parser.add_argument("--captions", action="store_true", help="the third stage")
    parser.add_argument("--minutes", type=float, default=9, help="of the third stage")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.captions:
        train_captions(args.minutes, args.batch or 48, args.lr)
        return
    if args.vision_only:
        train_vision(args.steps or 2600, args.batch or 64, args.lr)
        return
    train_both(args.steps or 1500, args.batch or 48, args.lr, args.vocabulary)


def train_both(steps: int, batch_size: int, lr: float, vocabulary: str) -> None:
    """The first stage: both towers on the vocabulary the UNet will know."""
    rows = load_rows(vocabulary)
    pictures = load_pictures(rows)
    tokenizer = make_tokenizer()
    model = Contrast(text_model(tokenizer), vision_model())
    print("parameters", {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    loop = Loop(RUNS / "clip.pt", steps, model, optimizer, Ema(model, 0.998), warmup=150)
    for step in loop:
        random.seed(step)
        picked = random.sample(range(len(rows)), batch_size)
        batch = [rows[i] for i in picked]
        drawn = [draw(row) for row in batch]
        ids = tokenizer(
            [text for text, _ in drawn], padding="max_length", max_length=LENGTH, return_tensors="pt"
        ).input_ids
        images = normalise(augment(pictures[picked]))
        v = F.normalize(model.vision(images).image_embeds, dim=-1)
        t = F.normalize(model.text_projection(model.text(ids).pooler_output), dim=-1)
        logits = model.log_scale.exp() * v @ t.T + model.bias
        labels = torch.tensor(
            [
                [
                    1.0
                    if claim[0] in (None, row["groups"]["concept"])
                    and claim[1] in (None, row["groups"]["style"])
                    else -1.0
                    for _, claim in drawn
                ]
                for row in batch
            ]
        )
        loss = -F.logsigmoid(labels * logits).sum() / batch_size
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress_mean(loop.log, "loss", loss.item())
        progress_mean(loop.log, "top1", float((logits.diagonal() >= logits.max(1).values).float().mean()))
    assert loop.ema
    loop.ema.copy_to(model)
    model.eval().half()
    model.text.save_pretrained(MODEL / "text_encoder")
    model.vision.save_pretrained(MODEL / "image_encoder")
    write_feature_extractor()


class Eye(nn.Module):
    """The image tower with classifiers of concept and style for its second stage."""

    def __init__(self, vision: CLIPVisionModelWithProjection, concepts: int, styles: int) -> None:
        super().__init__()
        self.vision = vision
        self.concept, self.style = nn.Linear(256, concepts), nn.Linear(256, styles)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-4.0))

    def forward(self, images: Tensor, keep: float) -> Tensor:
        """Image embeddings from a random share ``keep`` of the patches."""
        tower = self.vision.vision_model
        tokens = tower.embeddings(images)
        patches = tokens.shape[1] - 1
        kept = 1 + torch.rand(len(images), patches).argsort(1)[:, : round(keep * patches)]
        kept = torch.cat([torch.zeros(len(images), 1, dtype=torch.long), kept], 1)
        tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
        hidden = tower.encoder(inputs_embeds=tower.pre_layrnorm(tokens)).last_hidden_state
        return self.vision.visual_projection(tower.post_layernorm(hidden[:, 0]))


@torch.no_grad()
def captions_of(rows: list[Row]) -> Tensor:
    """The locked text tower's embedding of each row's first full caption, normalised."""
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    model = Contrast(text_model(tokenizer), vision_model())
    Loop(RUNS / "clip.pt", 0, model, torch.optim.AdamW(model.parameters()), ema := Ema(model))
    ema.copy_to(model)
    texts = [row["captions"]["full"][0] for row in rows]
    out = []
    for i in range(0, len(texts), 128):
        batch = tokenizer(
            texts[i : i + 128], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        out.append(F.normalize(model.text_projection(model.text(batch.input_ids).pooler_output), dim=-1))
    return torch.cat(out)


def train_vision(steps: int, batch_size: int, lr: float) -> None:
    """The second stage: the image tower alone; half of each batch is of the vocabulary."""
    rows = load_rows("all")
    pictures, texts = load_pictures(rows), captions_of(rows)
    known = {row["file_name"] for row in load_rows("small")}
    near = [i for i, row in enumerate(rows) if row["file_name"] in known]
    concepts, styles = (sorted({row["groups"][kind] for row in rows}) for kind in ("concept", "style"))
    concept_of = torch.tensor([concepts.index(row["groups"]["concept"]) for row in rows])
    style_of = torch.tensor([styles.index(row["groups"]["style"]) for row in rows])
    eye = Eye(vision_model(), len(concepts), len(styles))
    first = torch.load(RUNS / "clip.pt", weights_only=True)["ema"]
    eye.vision.load_state_dict({k[7:]: v for k, v in first.items() if k.startswith("vision.")}, strict=False)
    optimizer = torch.optim.AdamW(eye.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    loop = Loop(RUNS / "clip-vision.pt", steps, eye, optimizer, Ema(eye, 0.995), warmup=100)
    for step in loop:
        random.seed(step)
        picked = random.sample(near, batch_size // 2) + random.sample(range(len(rows)), batch_size // 2)
        embeds = eye(normalise(augment(pictures[picked])), 0.5 if step < 0.9 * steps else 1.0)
        labels = 2 * torch.eye(batch_size) - 1
        logits = eye.log_scale.exp() * F.normalize(embeds, dim=-1) @ texts[picked].T + eye.bias
        by_concept = F.cross_entropy(eye.concept(embeds), concept_of[picked], label_smoothing=0.1)
        by_style = F.cross_entropy(eye.style(embeds), style_of[picked])
        loss = by_concept + by_style - F.logsigmoid(labels * logits).sum() / batch_size
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(eye.parameters(), 1.0)
        optimizer.step()
        hit = eye.style(embeds).argmax(1) == style_of[picked]
        progress_mean(loop.log, "concept", by_concept.item())
        progress_mean(loop.log, "style", by_style.item())
        progress_mean(loop.log, "style_right", float(hit.float().mean()))
    assert loop.ema
    loop.ema.copy_to(eye)
    eye.vision.eval().half().save_pretrained(MODEL / "image_encoder")


def train_captions(minutes: float, batch_size: int, lr: float) -> None:
    """The third stage: two thirds of each batch are of the vocabulary."""
    from adapters import few, seen_by
    from diffusers import UNet2DConditionModel
    from unet import Captions

    near = load_rows("small")
    words = {row["groups"]["concept"] for row in near}
    rows = near + [row for row in load_rows("core") if row["groups"]["concept"] not in words]
    pictures, captions = load_pictures(rows), Captions(rows)
    said = [row["captions"]["full"][0] for row in rows]
    states = few(captions[said], torch.tensor([captions.ends[text] for text in said]))
    seen = seen_by(UNet2DConditionModel.from_pretrained(MODEL / "unet").float())
    spread = ((states - states.mean(0)) @ seen).square().mean()
    concepts, styles = (sorted({row["groups"][kind] for row in rows}) for kind in ("concept", "style"))
    concept_of = torch.tensor([concepts.index(row["groups"]["concept"]) for row in rows])
    style_of = torch.tensor([styles.index(row["groups"]["style"]) for row in rows])
    vision = CLIPVisionModelWithProjection.from_pretrained(MODEL / "image_encoder").float()
    eye = Eye(vision, len(concepts), len(styles))
    eye.said = nn.Sequential(nn.Linear(256, 4 * 256), nn.Unflatten(1, (4, 256)), nn.LayerNorm(256))
    optimizer = torch.optim.AdamW(eye.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    loop = Loop(RUNS / "clip-captions.pt", 0, eye, optimizer, Ema(eye, 0.995), warmup=50, minutes=minutes)
    half = torch.cpu._is_avx512_bf16_supported()
    few_far = batch_size // 3
    for step in loop:
        random.seed(step)
        picked = random.sample(range(len(near)), batch_size - few_far)
        picked += random.sample(range(len(near), len(rows)), few_far)
        images = normalise(augment(pictures[picked]))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            embeds = eye(images, 0.6 if loop.part() < 0.7 else 1.0)
            by_concept = F.cross_entropy(eye.concept(embeds), concept_of[picked], label_smoothing=0.05)
            by_style = F.cross_entropy(eye.style(embeds), style_of[picked])
            told = eye.said(embeds)
        left = ((told.float() - states[picked]) @ seen).square().mean() / spread
        loss = 0.5 * by_concept + by_style + 2 * left
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(eye.parameters(), 1.0)
        optimizer.step()
        hit = eye.style(embeds.float()).argmax(1) == style_of[picked]
        progress_mean(loop.log, "concept", by_concept.item())
        progress_mean(loop.log, "left", left.item())
        progress_mean(loop.log, "style_right", float(hit.float().mean()))
    assert loop.ema
    loop.ema.copy_to(eye)
    eye.vision.eval().half().save_pretrained(MODEL / "image_encoder")


def write_feature_extractor() -> None:
    (MODEL / "feature_extractor").mkdir(exist_ok=True)
    (MODEL / "feature_extractor" / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 128, "width": 128},
                "size": {"shortest_edge": 128}, "do_resize": True, "do_center_crop": True, "do_rescale": True,
                "do_normalize": True, "do_convert_rgb": True, "rescale_factor": 1 / 255, "resample": 3,
                "image_mean": MEAN.flatten().tolist(), "image_std": STD.flatten().tolist(),
            },
            indent=2,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
