"""Tokenizer and text encoder (CLIP's layouts) for the captions of ``draw.py``.

Every word of the captions is one token, so that a caption fits and a word is learned once; other words are
spelled. A word's embedding starts as the mean of the pieces the model of START spells it with. The encoder
itself is trained together with the UNet (``adapters.py``).
"""

import json

import numpy as np
import torch
from common import DEVICE, MODEL, START
from diffusers import UNet2DConditionModel
from draw import BACKGROUNDS, COLOURS, LOOKS, plural
from icons import HERE
from labels import LENGTH
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

MOTIONS = ("bouncing", "spinning", "sliding left", "sliding right", "growing", "shaking")
OTHER_WORDS = (
    "a an the and on in of to with from at by one two three four style background picture pattern gradient "
    "watercolor drawing art pale dark light big small left right cats dogs colours sitting flying happy"
)


def words() -> list[str]:
    concepts = list(json.loads((HERE / "concepts.json").read_text()))
    texts = [*concepts, *map(plural, concepts), *LOOKS, *BACKGROUNDS, *COLOURS, *MOTIONS, OTHER_WORDS]
    return sorted({word for text in texts for word in text.split()})


def make_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's file format whose merges spell exactly the words of the captions."""
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
    )  # fmt: skip
    tokenizer.train_from_iterator([" , ".join(words())] * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in model["merges"]]
    # CLIP spells every byte twice, bare and as the end of a word; those no word ended in are added.
    vocab = dict(model["vocab"])
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab.setdefault(symbol + "</w>", len(vocab))
    folder = MODEL / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    made = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)
    made.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def make_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """START's text encoder with this tokenizer's words and ``LENGTH`` positions."""
    old = CLIPTextModel.from_pretrained(START / "text_encoder").float()
    spelled = CLIPTokenizer.from_pretrained(START / "tokenizer")
    config = old.config
    config.vocab_size, config.max_position_embeddings = len(tokenizer), LENGTH
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    new = CLIPTextModel(config).float()
    state = old.state_dict()
    (embeddings,) = (name for name in state if name.endswith("token_embedding.weight"))
    (positions,) = (name for name in state if name.endswith("position_embedding.weight"))
    before, made = state[embeddings], new.state_dict()
    for token, i in tokenizer.get_vocab().items():
        if token.endswith("</w>") and len(token) > 5:
            pieces = spelled(token.removesuffix("</w>"), add_special_tokens=False).input_ids
            made[embeddings][i] = before[pieces].mean(0)
    made[embeddings][tokenizer.bos_token_id] = before[spelled.bos_token_id]
    made[embeddings][tokenizer.eos_token_id] = before[spelled.eos_token_id]
    old_positions = state[positions]
    made[positions][: len(old_positions)] = old_positions
    made[positions][len(old_positions) :] = old_positions[-1]
    state |= {embeddings: made[embeddings], positions: made[positions]}
    new.load_state_dict(state, strict=False)
    return new


class Texts:
    """Captions to hidden states (N, LENGTH, C); each different caption is encoded once."""

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder

    def __call__(self, texts: list[str]) -> Tensor:
        unique = sorted(set(texts))
        ids = self.tokenizer(
            unique, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).input_ids
        hidden = self.encoder(ids.to(DEVICE)).last_hidden_state
        return hidden[torch.tensor([unique.index(text) for text in texts], device=hidden.device)]


def frozen_base() -> tuple[UNet2DConditionModel, Texts]:
    """The UNet as it is now, and what encodes texts for it; neither is trained."""
    unet = UNet2DConditionModel.from_pretrained(MODEL / "unet").float().eval().requires_grad_(False)
    text = CLIPTextModel.from_pretrained(MODEL / "text_encoder").float().eval().requires_grad_(False)
    return unet.to(DEVICE), Texts(CLIPTokenizer.from_pretrained(MODEL / "tokenizer"), text.to(DEVICE))


def longest(tokenizer: CLIPTokenizer, texts: list[str]) -> int:
    return int(np.max([len(tokenizer(text).input_ids) for text in texts]))
