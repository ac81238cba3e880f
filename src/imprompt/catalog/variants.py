"""The kinds of adapter: what makes the image tokens, from which features, and what stands for no picture."""

from dataclasses import dataclass
from typing import Literal

Feature = Literal["pooled", "hidden", "last", "face", "face+hidden"]
ProjectionKind = Literal[
    "linear", "resampler", "timed-resampler", "patch-mlp", "mlp", "face-resampler", "redux"
]  # fmt: skip
NegativeRule = Literal["zero_features", "encoded_zeros", "black_picture", "none"]


@dataclass(frozen=True)
class Variant:
    """One way of making image tokens."""

    name: str
    projection: ProjectionKind
    feature: Feature
    """``pooled``: the encoder's projected embedding (SigLIP: its pooler's output). ``hidden``: its
    ``hidden_states[-2]``, all tokens. ``last``: its last hidden state. ``face``: a face embedding.
    ``face+hidden``: that and the hidden states of the aligned face crop."""
    negative: NegativeRule
    """Tokens of the unconditional rows. ``zero_features``: the projection of zeros (of all its inputs).
    ``encoded_zeros``: of the encoder's features of an all-zero *preprocessed* tensor (FaceID-Plus: with a
    zero face embedding). ``black_picture``: of the features of a black picture. ``none``: those rows get no
    image term."""
    about: str
    embedding: Literal["normed", "raw"] | None = None
    """Whether the face embedding is L2-normalised; ``None``: it reads none."""
    shortcut: bool = False
    """FaceID-PlusV2: ``tokens = face tokens + s_scale · resampled``; Plus has the second term only."""
    crop: Literal["aligned", "square"] = "aligned"
    """The picture beside a face embedding: the upright face, or the square around its box."""
    uses_text_projection: bool = False
    """Whether tokens are as wide as the text before the UNet's own projection, and go through it."""
    timed: bool = False
    """Whether the tokens depend on the timestep."""
    beside_text: bool = False
    """Whether the base reads the tokens among the text's."""

    @property
    def reads_faces(self) -> bool:
        """Whether it reads a face in the picture rather than the whole picture."""
        return self.embedding is not None


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("linear", "linear", "pooled", "zero_features", "one linear layer on the pooled embedding"),
        Variant("resampler", "resampler", "hidden", "encoded_zeros", "Perceiver resampler on all patches"),
        Variant("full-face", "patch-mlp", "hidden", "encoded_zeros", "an MLP on each patch"),
        Variant("faceid", "mlp", "face", "zero_features", "an MLP on a normalised face embedding", "normed"),
        Variant(
            "faceid-raw", "resampler", "face", "zero_features",
            "Perceiver resampler on an unnormalised face embedding", "raw",
        ),
        Variant(
            "faceid-plus", "face-resampler", "face+hidden", "encoded_zeros",
            "face tokens query the face crop's patches; tokens = resampled", "normed",
        ),
        Variant(
            "faceid-plusv2", "face-resampler", "face+hidden", "encoded_zeros",
            "face tokens query the face crop's patches; tokens = face tokens + s_scale · resampled",
            "normed", shortcut=True,
        ),
        Variant(
            "faceid-plus-kolors", "face-resampler", "face+hidden", "zero_features",
            "as faceid-plusv2 from an unnormalised embedding, through the UNet's projection of its text",
            "raw", shortcut=True, crop="square", uses_text_projection=True,
        ),
        Variant(
            "xlabs", "linear", "pooled", "black_picture",
            "one linear layer on the pooled embedding; keys and values with bias, in FLUX's double blocks",
        ),
        Variant(
            "instantx-flux", "mlp", "pooled", "none",
            "an MLP on the pooled embedding; normalised keys, in all of FLUX's blocks",
        ),
        Variant(
            "instantx-sd3", "timed-resampler", "hidden", "zero_features",
            "Perceiver resampler that reads all patches and the timestep", timed=True,
        ),
        Variant(
            "redux", "redux", "last", "none",
            "an MLP on each patch; the tokens are appended to FLUX's text", beside_text=True,
        ),
    )
}  # fmt: skip
"""Name → variant. Sources: the adapters' published code; DIT adapters as described by InstantX and XLabs."""
