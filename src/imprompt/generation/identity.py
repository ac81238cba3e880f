"""InstantID's ControlNet (IdentityNet): it reads face tokens where other ControlNets read the text."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.errors import ModelError, UsageError
from imprompt.generation.control import Control


@contextmanager
def face_states(
    pipe: Any, controls: Sequence[Control], negative: Float[Tensor, "N T C"], positive: Float[Tensor, "N T C"]
) -> Iterator[None]:
    """While this is open, the ControlNets of face controls read face tokens in place of text states.

    ``negative`` and ``positive`` are the image tokens (N, T, C) of the N pictures of a batch. A ControlNet
    that is called with all rows of classifier-free guidance reads [negative, positive], one that is called
    with the conditional rows alone (guess mode) reads ``positive``; pooled text and time ids stay (Wang et
    al. 2024, InstantID, and its published pipeline). The hooks are removed at the end.
    """
    models = getattr(pipe.controlnet, "nets", [pipe.controlnet])
    both = torch.cat([negative, positive])

    def replace(_: Any, args: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states = call["encoder_hidden_states"]
        tokens = both if len(states) % len(both) == 0 else positive
        if len(states) % len(tokens):
            raise ModelError(f"the face tokens of {len(positive)} pictures do not fit {len(states)} rows.")
        repeated = tokens.repeat_interleave(len(states) // len(tokens), 0)
        return args, call | {"encoder_hidden_states": repeated.to(states)}

    with ExitStack() as hooks:
        for control, model in zip(controls, models, strict=True):
            if control.reads_face:
                handle = model.register_forward_pre_hook(replace, with_kwargs=True)
                hooks.callback(handle.remove)
        yield


def face_controls(
    pipe: Any, controls: Sequence[Control], adapters: Mapping[str, IPAdapter], rows: int
) -> AbstractContextManager[None]:
    """:func:`face_states` with the tokens of the face adapter among ``adapters``, whose prompts are set.

    ``rows`` is the number of pictures of the call, or of a clip's frames. Does nothing without a face
    control. Raises :class:`UsageError` when no adapter reads faces.
    """
    adapter = face_adapter(controls, {name: each for name, each in adapters.items() if each.samples})
    if adapter is None:
        return nullcontext()
    prompts = [sample[0] for sample in adapter.samples if sample]
    negatives = [torch.zeros_like(p.tokens) if p.negative is None else p.negative for p in prompts]
    negative, positive = (
        torch.stack(tokens).repeat_interleave(rows // len(prompts), 0)
        for tokens in (negatives, [prompt.tokens for prompt in prompts])
    )
    return face_states(pipe, controls, negative, positive)


def face_adapter(controls: Sequence[Control], adapters: Mapping[str, IPAdapter]) -> IPAdapter | None:
    """The adapter whose tokens face controls read; ``None`` without such a control.

    Raises :class:`UsageError` when no adapter reads faces.
    """
    if not any(control.reads_face for control in controls):
        return None
    for adapter in adapters.values():
        if adapter.projection.variant.reads_faces:
            return adapter
    raise UsageError(
        "control face: its ControlNet reads the face, and no image prompt shows one to a face adapter; give "
        "--image PHOTO --adapter sdxl-instantid."
    )
