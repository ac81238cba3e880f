"""Attention as plain products: numbers and gradients of the fused kernel, and only where it is asked for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from imprompt.training.short_attention import ShortAttention


class Names(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def inputs(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(queries + keys)
    shapes = [(2, queries, 3, 16), (2, keys, 3, 16), (2, keys, 3, 16)]
    drawn = [torch.randn(shape, generator=random).to(dtype).transpose(1, 2) for shape in shapes]
    return [each.requires_grad_() for each in drawn]


def bias_of(kind: str | None, keys: int) -> Tensor | None:
    if kind is None:
        return None
    seen = torch.arange(keys)[None, None, None] < keys - 1
    return seen if kind == "boolean" else torch.where(seen, 0.5, float("-inf"))


@pytest.mark.parametrize("kind", [None, "boolean", "added"])
def test_plain_products_have_the_fused_kernels_numbers_and_gradients(kind: str | None) -> None:
    found = []
    for mode in (None, ShortAttention()):
        states = inputs(20, 7)
        if mode is None:
            out = F.scaled_dot_product_attention(*states, attn_mask=bias_of(kind, 7))
        else:
            with mode:
                out = F.scaled_dot_product_attention(*states, attn_mask=bias_of(kind, 7))
        out.square().sum().backward()
        found.append([out, *(each.grad for each in states)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_half_precision_is_as_near_to_the_exact_gradient_as_the_fused_kernel() -> None:
    exact = inputs(64, 64, torch.float64)
    F.scaled_dot_product_attention(*exact).square().sum().backward()
    off = []
    for mode in (None, ShortAttention()):
        states = inputs(64, 64, torch.bfloat16)
        if mode is None:
            out = F.scaled_dot_product_attention(*states)
        else:
            with mode:
                out = F.scaled_dot_product_attention(*states)
        out.float().square().sum().backward()
        off.append(
            sum(float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in zip(states, exact, strict=True))
        )
    fused, plain = off
    assert plain < 1.5 * fused < 0.1


@pytest.mark.parametrize(
    ("queries", "keys", "plain"), [(5000, 128, True), (1024, 512, True), (1025, 512, False)]
)
def test_long_sequences_and_drawings_keep_the_fused_kernel(queries: int, keys: int, plain: bool) -> None:
    states = inputs(queries, keys)

    def fused() -> bool:
        with ShortAttention(), Names() as names:
            F.scaled_dot_product_attention(*states)
        return any("scaled_dot_product" in name for name in names.seen)

    assert fused() != plain
    with torch.no_grad():
        assert fused()


@pytest.mark.parametrize("option", [{"is_causal": True}, {"scale": 0.3}])
def test_options_that_it_does_not_know_go_to_the_fused_kernel(option: dict[str, object]) -> None:
    states = inputs(8, 8)
    wanted = F.scaled_dot_product_attention(*states, **option)
    with ShortAttention():
        assert torch.equal(F.scaled_dot_product_attention(*states, **option), wanted)
