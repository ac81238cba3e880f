"""Kernels for training on a CPU: numbers and gradients of PyTorch's, and only where they are faster."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from imprompt.packed import works
from imprompt.training.cpu_kernels import CPUKernels

half = pytest.mark.skipif(
    not works(torch.bfloat16), reason="this processor, or PyTorch, has no kernels for bfloat16"
)


class Names(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.dtypes: set[torch.dtype] = set()
        """Of the states of group normalizations."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        if func.overloadpacket.__name__ == "native_group_norm":
            self.dtypes.add(args[0].dtype)
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
    for mode in (None, CPUKernels()):
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
    for mode in (None, CPUKernels()):
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
        with CPUKernels(), Names() as names:
            F.scaled_dot_product_attention(*states)
        return any("scaled_dot_product" in name for name in names.seen)

    assert fused() != plain
    with torch.no_grad():
        assert fused()


@pytest.mark.parametrize("option", [{"is_causal": True}, {"scale": 0.3}])
def test_options_that_it_does_not_know_go_to_the_fused_kernel(option: dict[str, object]) -> None:
    states = inputs(8, 8)
    wanted = F.scaled_dot_product_attention(*states, **option)
    with CPUKernels():
        assert torch.equal(F.scaled_dot_product_attention(*states, **option), wanted)


def convolved(
    layer: torch.nn.Conv2d, states: Tensor, mode: CPUKernels | None, autocast: bool = False
) -> tuple[Tensor, Tensor, set[str]]:
    """The output, the gradient of the states for a weighted sum of it, and the names of all operations."""
    states = states.clone().requires_grad_()
    with mode or nullcontext(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), Names() as names:
        out = layer(states)
        (out.float() * torch.linspace(-1, 1, out[0].numel()).view_as(out[0])).sum().backward()
    assert states.grad is not None
    return out, states.grad, names.seen


def layer_of(channels: int = 24, out: int = 40, side: int = 3, **options: object) -> torch.nn.Conv2d:
    torch.manual_seed(side)
    return torch.nn.Conv2d(channels, out, side, **options).to(torch.bfloat16).requires_grad_(False)  # type: ignore[arg-type]


@half
@pytest.mark.parametrize("mode", [CPUKernels()])
@pytest.mark.parametrize(
    ("side", "padding", "bias"), [(3, 1, True), (3, 0, True), (1, 0, False), (5, 2, True), (3, 2, False)]
)
def test_a_frozen_convolution_has_the_numbers_and_gradients_of_pytorchs(
    mode: CPUKernels, side: int, padding: int, bias: bool
) -> None:
    layer = layer_of(side=side, padding=padding, bias=bias)
    exact = layer_of(side=side, padding=padding, bias=bias).double()
    for shape in ((2, 24, 9, 7), (1, 24, 16, 16), (3, 24, 8, 8)):  # one layer sees several
        states = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        wanted, wanted_gradient, _ = convolved(exact, states.double(), None)
        out, gradient, names = convolved(layer, states, mode)
        assert "convolution_backward" not in names
        torch.testing.assert_close(out.double(), wanted, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-2, atol=1e-2)


@half
def test_under_autocast_states_of_float32_are_convolved_in_bfloat16() -> None:
    layer, states = layer_of(padding=1), torch.randn(1, 24, 8, 8)
    wanted, wanted_gradient, _ = convolved(layer, states, None, autocast=True)
    out, gradient, names = convolved(layer, states, CPUKernels(), autocast=True)
    assert (
        (out.dtype, gradient.dtype)
        == (wanted.dtype, wanted_gradient.dtype)
        == (torch.bfloat16, torch.float32)
    )
    assert "convolution_backward" not in names
    torch.testing.assert_close(out, wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-2, atol=1e-2)


def test_weights_written_in_place_are_read_anew() -> None:
    layer, states, mode = layer_of(padding=1), torch.randn(1, 24, 8, 8, dtype=torch.bfloat16), CPUKernels()
    convolved(layer, states, mode)
    layer.weight.mul_(2)
    wanted, wanted_gradient, _ = convolved(layer, states, None)
    out, gradient, _ = convolved(layer, states, mode)
    torch.testing.assert_close(out, wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"dilation": 2}, {"groups": 4}, {"padding": "same"}, {"padding": (0, 1)}]
)
def test_convolutions_that_it_does_not_know_stay_pytorchs(options: dict[str, object]) -> None:
    layer, states = layer_of(**options), torch.randn(1, 24, 8, 8, dtype=torch.bfloat16)  # type: ignore[arg-type]
    wanted, wanted_gradient, _ = convolved(layer, states, None)
    out, gradient, names = convolved(layer, states, CPUKernels())
    assert "convolution_backward" in names
    assert torch.equal(out, wanted)
    assert torch.equal(gradient, wanted_gradient)


def test_trained_convolutions_get_their_gradients() -> None:
    layer, states = layer_of(padding=1).requires_grad_(True), torch.randn(1, 24, 8, 8, dtype=torch.bfloat16)
    convolved(layer, states, CPUKernels())
    assert layer.weight.grad is not None
    assert layer.bias is not None
    assert layer.bias.grad is not None


@pytest.mark.parametrize(("channels", "in_float32"), [(32, True), (160, False)])
def test_a_normalization_of_few_channels_goes_by_float32(channels: int, in_float32: bool) -> None:
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(8, channels).to(torch.bfloat16).requires_grad_(False)
    given = torch.randn(2, channels, 6, 6).to(torch.bfloat16, memory_format=torch.channels_last)
    found = []
    for mode in (None, CPUKernels()):
        states = given.clone().requires_grad_()
        with mode or nullcontext(), Names() as names:
            out = norm(states)
            (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append((out, states.grad))
        assert (torch.float32 in names.dtypes) == (mode is not None and in_float32)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
