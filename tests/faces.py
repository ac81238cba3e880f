"""Random face adapters for the tiny pipelines, in the exact published layout."""

import torch
from diffusers import UNet2DConditionModel

from layouts import Shapes, face, face_plus, lora, resampler
from tiny import HIDDEN, StateDict, random_adapter_state


def projections(cross: int) -> dict[str, Shapes]:
    """Variant → its projection's shapes for a UNet of this width (FaceID-Plus: a multiple of 64)."""
    plus = (
        {}
        if cross % 64
        else dict.fromkeys(("faceid-plus", "faceid-plusv2"), face_plus(cross, patches=HIDDEN))
    )
    return {
        "faceid": face(cross),
        "portrait": face(cross, 16),
        "faceid-raw": resampler(cross, 512, 64, 1),
        **plus,
    }


def face_state(
    unet: UNet2DConditionModel, variant: str = "faceid", *, rank: int | None = 4, seed: int = 3
) -> StateDict:
    """Random weights; ``rank`` of the LoRA, ``None`` for none."""
    random = torch.Generator().manual_seed(seed)
    cross = unet.config.cross_attention_dim

    def weights(shapes: Shapes) -> dict[str, torch.Tensor]:
        return {
            key: torch.randn(shape, generator=random) / (shape[-1] ** 0.5 if len(shape) > 1 else 1.0)
            for key, shape in shapes.items()
        }

    state = random_adapter_state(unet, seed=seed)
    state["image_proj"] = weights(projections(cross)[variant])
    if rank is not None:
        widths = [
            unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for name in unet.attn_processors
            if name.endswith("attn2.processor")
        ]
        state["ip_adapter"] |= {key: 0.7 * each for key, each in weights(lora(widths, cross, rank)).items()}
    return state


def person(seed: int = 2, count: int = 1, *, length: float = 1.0) -> torch.Tensor:
    """``count`` face embeddings of a length."""
    random = torch.Generator().manual_seed(seed)
    return length * torch.nn.functional.normalize(torch.randn(count, 512, generator=random), dim=-1)
