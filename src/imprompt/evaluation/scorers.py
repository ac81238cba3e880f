"""Models that score pictures and texts: CLIP or SigLIP, DINO, face recognition. Each is loaded by name.

A scorer turns pictures into unit embeddings. One that also reads texts puts both into one space;
:func:`tells_texts` checks this before CLIP-T is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.face import FaceEmbedder
from imprompt.errors import ImpromptError, ModelError, UsageError, first_line
from imprompt.evaluation.metrics import bootstrap
from imprompt.io import read_json

BATCH = 16
LEAST_GAP = 1e-3
"""Least difference in cosine between true captions and others for CLIP-T to be reported."""
Images = Sequence[Image.Image]
FaceReader = Callable[[Image.Image], Tensor | None]
"""A picture to the unit embedding of its largest face, ``E``; ``None`` without a face."""


@dataclass(frozen=True)
class Scorer:
    """A named model: pictures (and texts) to unit embeddings, ``N E``."""

    name: str
    embed_images: Callable[[Images], Tensor]
    embed_texts: Callable[[Sequence[str]], Tensor] | None = None

    def images(self, images: Images) -> Tensor:
        """Unit embeddings of pictures."""
        with torch.inference_mode():
            parts = [self.embed_images(images[at : at + BATCH]) for at in range(0, len(images), BATCH)]
        return functional.normalize(torch.cat(parts).float().cpu(), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings of texts. Raises :class:`UsageError` for a scorer that reads none."""
        if self.embed_texts is None:
            raise UsageError(f"'{self.name}' reads no texts.")
        with torch.inference_mode():
            return functional.normalize(self.embed_texts(texts).float().cpu(), dim=-1)


def load_clip(name: str) -> Scorer:
    """A CLIP or SigLIP by folder or hub id; a vision tower alone reads no texts.

    Raises :class:`ModelError` when it is not there or no such model."""
    from transformers import AutoConfig, AutoModel, AutoProcessor

    try:
        config: Any = AutoConfig.from_pretrained(name)
        if "vision" in config.model_type:
            return encoder_scorer(ImageEncoder.from_pretrained(name, torch_dtype=torch.float32))
        model: Any = AutoModel.from_pretrained(name, use_safetensors=True).eval()
        processor: Any = AutoProcessor.from_pretrained(name)
    except ImpromptError:
        raise
    except Exception as error:  # loaders raise nearly anything
        raise ModelError(f"'{name}' is no CLIP or SigLIP that can be loaded: {first_line(error)}.") from error
    if not hasattr(model, "get_image_features"):
        raise ModelError(f"'{name}' is a {config.model_type}, no CLIP or SigLIP.")
    padding = "max_length" if "siglip" in config.model_type else True

    def images(some: Images) -> Tensor:
        return _pooled(model.get_image_features(**processor(images=list(some), return_tensors="pt")))

    def texts(some: Sequence[str]) -> Tensor:
        prepared = processor(text=list(some), return_tensors="pt", padding=padding, truncation=True)
        return _pooled(model.get_text_features(**prepared))

    return Scorer(name, images, texts)


def load_own(folder: Path) -> Scorer | None:
    """The image encoder in a diffusers folder, with the text encoder if both have the same width, as in one
    CLIP.

    ``None`` without an image encoder."""
    if not (folder / "image_encoder" / "config.json").is_file():
        return None
    encoder = ImageEncoder.from_pretrained(folder / "image_encoder", torch_dtype=torch.float32)
    scorer = encoder_scorer(encoder)
    about = folder / "text_encoder" / "config.json"
    stated = read_json(about, f"'{about}'", error=ModelError) if about.is_file() else {}
    if stated.get("hidden_size") != encoder.pooled_width:
        return scorer
    from transformers import CLIPTextModel, CLIPTokenizer

    model: Any = CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    def texts(some: Sequence[str]) -> Tensor:
        return model(
            **tokenizer(list(some), padding="max_length", truncation=True, return_tensors="pt")
        ).pooler_output

    return Scorer(scorer.name, scorer.embed_images, texts)


def encoder_scorer(encoder: ImageEncoder) -> Scorer:
    """An adapter's image encoder as a scorer of pictures."""
    return Scorer(Path(encoder.name).name or encoder.name, lambda some: encoder.encode(list(some)).pooled)


def load_dino(name: str) -> Scorer:
    """A DINO, DINOv2 or DINOv3 by folder or hub id: its class token. Raises :class:`ModelError`."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        model: Any = AutoModel.from_pretrained(name, use_safetensors=True).eval()
        processor: Any = AutoImageProcessor.from_pretrained(name)
    except Exception as error:  # loaders raise nearly anything
        raise ModelError(f"'{name}' is no DINO model that can be loaded: {first_line(error)}.") from error

    def images(some: Images) -> Tensor:
        states: Tensor = model(**processor(images=list(some), return_tensors="pt")).last_hidden_state
        return states[:, 0]

    return Scorer(name, images)


def face_reader(reader: FaceEmbedder) -> FaceReader:
    """What gives the L2-normalised embedding (E) of the largest face of a picture, ``None`` without one."""

    def embed(image: Image.Image) -> Tensor | None:
        faces = reader.find(image)
        if not faces:
            return None
        largest = max(faces, key=lambda face: float(face.area))
        return functional.normalize(torch.from_numpy(reader.embed(image, largest)).float(), dim=-1)

    return embed


def tells_texts(scorer: Scorer, images: Tensor, captions: Sequence[str]) -> bool:
    """Whether a scorer puts real pictures nearer to their own captions than to those of others.

    The bootstrap interval of the difference must lie above :data:`LEAST_GAP`."""
    if scorer.embed_texts is None or len(set(captions)) < 4:
        return False
    texts = scorer.texts(captions)
    near = images @ texts.T
    own = near.diagonal()
    others = torch.stack(
        [
            near[i, [j for j, said in enumerate(captions) if said != captions[i]]].mean()
            for i in range(len(near))
        ]
    )
    low = bootstrap(own.double() - others.double()).low
    return low is not None and low > LEAST_GAP


def _pooled(output: Any) -> Tensor:
    """The pooled tensor, which newer versions of transformers wrap in an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output
