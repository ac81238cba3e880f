"""Layers that remember their weights in oneDNN's order: the numbers of plain layers, and when not to."""

import copy
import pickle

import pytest
import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from imprompt import onednn, packed
from imprompt.packed import pack

pytestmark = pytest.mark.skipif(
    not onednn.works(torch.float32), reason="this processor or PyTorch lacks the kernels"
)


class Names(TorchDispatchMode):
    """The names of all operations, and of how many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.rows: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen.append(name)
        if args and isinstance(args[0], Tensor) and args[0].dim():
            self.rows.append((name, len(args[0])))
        return func(*args, **(kwargs or {}))

    def rows_of(self, name: str) -> list[int]:
        return [rows for each, rows in self.rows if name in each]


class Small(nn.Module):
    """Convolutions of several kinds, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 24, 3, padding=1), nn.Conv2d(24, 40, 3, stride=2, padding=1), nn.Conv2d(40, 8, 1)
        )
        self.last = nn.Linear(8, 16, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.last(self.layers(states).flatten(2).transpose(1, 2))


def models(dtype: torch.dtype = torch.float32) -> tuple[Small, Small]:
    """The same model plain and packed."""
    torch.manual_seed(0)
    plain = Small().to(dtype)
    model = copy.deepcopy(plain)
    pack(model)
    return plain, model


def states(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def ran(model: nn.Module, given: Tensor) -> tuple[Tensor, list[str]]:
    """The output without gradients, and which kernels made it."""
    with torch.no_grad(), Names() as names:
        out = model(given)
    return out, [
        name for name in names.seen if name in ("convolution", "_convolution_pointwise", "_linear_pointwise")
    ]


def both(plain: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A module for drawing, plain and packed."""
    plain = plain.to(dtype).eval().requires_grad_(False)
    model = nn.Sequential(copy.deepcopy(plain))
    pack(model)
    return plain, model[0]


DTYPES = pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_have_the_numbers_of_plain_ones(dtype: torch.dtype) -> None:
    if not onednn.works(dtype):
        pytest.skip("this processor has no bfloat16 arithmetic")
    plain, model = models(dtype)
    near = 1e-5 if dtype == torch.float32 else 2e-2
    for shape in ((1, 4, 8, 8), (2, 4, 16, 12), (1, 4, 8, 8), (3, 4, 7, 9)):  # other sides, and back
        given = states(*shape, dtype=dtype)
        out, kernels = ran(model, given)
        assert kernels == ["_convolution_pointwise"] * 3 + ["_linear_pointwise"] * (dtype == torch.bfloat16)
        torch.testing.assert_close(out, ran(plain, given)[0], rtol=near, atol=near)


def test_a_changed_weight_is_ordered_anew() -> None:
    plain, model = models()
    given = states(1, 4, 8, 8)
    before, _ = ran(model, given)
    with torch.no_grad():
        for each in (plain, model):
            each.layers[0].weight.mul_(2)  # in place
            each.layers[2].weight = nn.Parameter(each.layers[2].weight * 3)  # replaced
    out, _ = ran(model, given)
    torch.testing.assert_close(out, ran(plain, given)[0], rtol=1e-5, atol=1e-5)
    assert (out - before).abs().max() > 0.1


def test_gradients_autocast_and_double_precision_are_pytorchs() -> None:
    plain, model = models()
    given = states(1, 4, 8, 8)
    for each in (plain, model):
        each(given).square().sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad), name
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = ran(model, given)
        torch.testing.assert_close(out, ran(plain, given)[0], rtol=2e-2, atol=2e-2)
    out, kernels = ran(model.double(), given.double())
    assert torch.equal(out, ran(plain.double(), given.double())[0])
    assert kernels == ["convolution"] * 3


def test_copies_and_saved_models_remember_nothing_and_draw_the_same() -> None:
    _, model = models()
    given = states(1, 4, 8, 8)
    wanted, _ = ran(model, given)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            again.layers[0].weight.mul_(2)  # not the first model's
        changed, _ = ran(again, given)
        assert (changed - wanted).abs().max() > 0.1
    assert torch.equal(ran(model, given)[0], wanted)
    assert set(model.state_dict()) == set(Small().state_dict())


def test_a_compiled_model_has_its_own_kernels() -> None:
    plain, model = models()
    given = states(1, 4, 8, 8)
    with torch.no_grad():
        out = torch.compile(model, backend="aot_eager", fullgraph=True)(given)
    torch.testing.assert_close(out, ran(plain, given)[0], rtol=1e-5, atol=1e-5)


def test_unusual_convolutions_and_other_kinds_of_layers_stay_as_they_are() -> None:
    class Own(nn.Conv2d):
        pass

    odd = nn.ModuleList(
        [
            nn.Conv2d(4, 4, 3, groups=2),
            nn.Conv2d(4, 4, 3, dilation=2),
            nn.Conv2d(4, 4, 3, padding="same"),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
            nn.Conv2d(4, 4, 3).double(),
            Own(4, 4, 3),
            nn.Conv1d(4, 4, 3),
        ]
    )
    kinds = [type(layer) for layer in odd]
    pack(odd)
    assert [type(layer) for layer in odd] == kinds


def test_layers_whose_copies_would_take_too_much_stay_as_they_are() -> None:
    def of(share: float) -> nn.Conv2d:
        """With a weight that claims a share of the budget, without taking any memory."""
        layer = nn.Conv2d(1, 1, 1)
        row = torch.zeros(1).expand(int(onednn.budget() * share / 4))
        layer.weight = nn.Parameter(row.view(-1, 1, 1, 1), requires_grad=False)
        return layer

    model = nn.Sequential(of(1.1), of(0.6), of(0.6), of(0.3))
    pack(model)
    is_packed = [type(layer) is packed.PackedConv2d for layer in model]
    assert is_packed == [False, True, False, True]


def test_a_gate_and_its_linear_layer_share_one_claim_on_the_memory() -> None:
    if not onednn.works(torch.bfloat16):
        pytest.skip("this processor has no bfloat16 arithmetic")
    gate = GEGLU(1, 1)
    row = torch.zeros(1, dtype=torch.bfloat16).expand(int(onednn.budget() * 0.6 / 2))
    gate.proj.weight = nn.Parameter(row.view(-1, 1), requires_grad=False)
    pack(model := nn.Sequential(gate))
    assert type(model[0]) is packed.PackedGEGLU
    assert type(model[0].proj) is packed.PackedLinear


@pytest.mark.parametrize("last", [True, False])
def test_a_normalization_of_few_channels_is_as_exact_as_pytorchs(last: bool) -> None:
    if not onednn.works(torch.bfloat16):
        pytest.skip("this processor has no bfloat16 arithmetic")
    torch.manual_seed(0)
    plain = nn.GroupNorm(8, 32).to(torch.bfloat16)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    norm = nn.Sequential(copy.deepcopy(plain))
    pack(norm)
    given = states(2, 32, 8, 8, dtype=torch.bfloat16)
    given = given.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    exact = ran(copy.deepcopy(plain).double(), given.double())[0]
    out, wanted = (ran(each, given)[0] for each in (norm, plain))
    off, usual = ((each.double() - exact).abs().max().item() for each in (out, wanted))
    assert off <= 1.01 * usual
    assert out.stride() == wanted.stride()


@DTYPES
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_gate_has_the_numbers_of_a_plain_one(dtype: torch.dtype, near: float, bias: bool) -> None:
    if not onednn.works(dtype):
        pytest.skip("this processor has no bfloat16 arithmetic")
    torch.manual_seed(0)
    plain, model = both(GEGLU(24, 40, bias=bias), dtype)
    for shape in ((2, 7, 24), (1, 3, 24), (2, 7, 24)):
        given = states(*shape, dtype=dtype)
        out, kernels = ran(model, given)
        assert kernels == ["_linear_pointwise"] * 2  # no activation and no product of their own
        torch.testing.assert_close(out, plain(given), rtol=near, atol=near)
    with torch.no_grad():
        for each in (plain, model):
            each.proj.weight.mul_(-2)
    torch.testing.assert_close(ran(model, given)[0], plain(given), rtol=near, atol=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_gate_hears_hooks_and_lora(dtype: torch.dtype) -> None:
    if not onednn.works(dtype):
        pytest.skip("this processor has no bfloat16 arithmetic")
    torch.manual_seed(0)
    plain, model = both(GEGLU(24, 40), dtype)
    given = states(2, 7, 24, dtype=dtype)
    hook = model.proj.register_forward_hook(lambda layer, args, out: out * 0)
    assert ran(model, given)[0].abs().max() == 0
    hook.remove()
    before = ran(model, given)[0]
    config = LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False)
    torch.manual_seed(1)
    inject_adapter_in_model(config, plain)
    torch.manual_seed(1)
    inject_adapter_in_model(config, model)
    out, _ = ran(model, given)
    torch.testing.assert_close(out, plain(given), rtol=2e-2, atol=2e-2)
    assert (out - before).abs().max() > 0.1


@DTYPES
@pytest.mark.parametrize("channels", [16, 24])
@pytest.mark.parametrize("time", [True, False])
def test_a_packed_residual_block_has_the_numbers_of_a_plain_one(
    dtype: torch.dtype, near: float, channels: int, time: bool
) -> None:
    if not onednn.works(dtype):
        pytest.skip("this processor has no bfloat16 arithmetic")
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=16, out_channels=channels, temb_channels=32 if time else None, groups=8)
    plain, model = both(block, dtype)
    assert type(model) is packed.PackedResnetBlock
    given, temb = states(2, 16, 8, 6, dtype=dtype), states(2, 32, dtype=dtype) if time else None
    kept, wanted = given.clone(), plain(given, temb)
    with torch.no_grad(), Names() as names:
        out = model(given, temb)
    assert "div" not in names.seen
    assert torch.equal(given, kept)
    torch.testing.assert_close(out, wanted, rtol=near, atol=near)


def test_a_residual_block_writes_nothing_in_place_where_somebody_reads_it() -> None:
    torch.manual_seed(0)
    plain, model = both(ResnetBlock2D(in_channels=16, temb_channels=32, groups=8), torch.float32)
    seen: dict[str, dict[str, Tensor]] = {"plain": {}, "packed": {}}
    for name, block in {"plain": plain, "packed": model}.items():
        for part in ("norm1", "conv1", "norm2", "conv2"):
            getattr(block, part).register_forward_hook(
                lambda layer, args, out, to=seen[name], part=part: to.update({part: out})
            )
        with torch.no_grad():
            block(states(2, 16, 8, 6), states(2, 32))
    for part, out in seen["plain"].items():
        torch.testing.assert_close(seen["packed"][part], out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"output_scale_factor": 2.0},
        {"time_embedding_norm": "scale_shift"},
        {"skip_time_act": True},
        {"non_linearity": "gelu"},
        {"up": True},
        {"down": True},
    ],
)
def test_residual_blocks_of_other_kinds_stay_as_they_are(options: dict[str, object]) -> None:
    _, model = both(ResnetBlock2D(in_channels=16, temb_channels=32, groups=8, **options), torch.float32)
    assert type(model) is ResnetBlock2D


def test_gradients_of_packed_blocks_are_pytorchs() -> None:
    torch.manual_seed(0)
    for block, given in (
        (ResnetBlock2D(in_channels=16, temb_channels=32, groups=8), (states(2, 16, 8, 6), states(2, 32))),
        (GEGLU(24, 40), (states(2, 7, 24),)),
    ):
        plain, model = both(block, torch.float32)
        grads = []
        for each in (plain, model):
            first = given[0].clone().requires_grad_()
            each(first, *given[1:]).square().sum().backward()
            grads.append(first.grad)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_a_packed_doubling_has_the_numbers_of_a_plain_one(bias: bool, last: bool) -> None:
    torch.manual_seed(0)
    plain, model = both(Upsample2D(16, use_conv=True, out_channels=24, bias=bias), torch.float32)
    for shape in ((2, 16, 5, 8), (1, 16, 1, 1), (2, 16, 5, 8)):
        given = states(*shape)
        given = given.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        with torch.no_grad(), Names() as names:
            out = model(given)
        assert "upsample_nearest2d" not in names.seen
        torch.testing.assert_close(out, plain(given), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for each in (plain, model):
            each.conv.weight.mul_(-2)
    torch.testing.assert_close(model(given), plain(given), rtol=1e-5, atol=1e-5)


def test_a_packed_doubling_hears_hooks_lora_and_another_size() -> None:
    torch.manual_seed(0)
    plain, model = both(Upsample2D(16, use_conv=True), torch.float32)
    given = states(2, 16, 4, 4)
    out, _ = ran(model, given)
    with torch.no_grad():
        torch.testing.assert_close(model(given, (7, 7)), plain(given, (7, 7)), rtol=1e-5, atol=1e-5)
    hook = model.conv.register_forward_hook(lambda layer, args, out: out * 0)
    assert ran(model, given)[0].abs().max() == 0
    hook.remove()
    for each in (plain, model):
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False)
        inject_adapter_in_model(config, each)
    changed, _ = ran(model, given)
    torch.testing.assert_close(changed, plain(given), rtol=1e-5, atol=1e-5)
    assert (changed - out).abs().max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"use_conv": False},
        {"use_conv_transpose": True},
        {"kernel_size": 5, "padding": 2},
        {"norm_type": "rms_norm", "eps": 1e-6, "elementwise_affine": True},
        {"interpolate": False},
    ],
)
def test_doublings_of_other_kinds_stay_as_they_are(options: dict[str, object]) -> None:
    _, model = both(Upsample2D(16, **{"use_conv": True} | options), torch.float32)
    assert type(model) is Upsample2D


@DTYPES
@pytest.mark.parametrize("flat", [True, False])
def test_a_packed_transformer_keeps_the_channels_last(dtype: torch.dtype, near: float, flat: bool) -> None:
    if not onednn.works(dtype):
        pytest.skip("this processor has no bfloat16 arithmetic")
    torch.manual_seed(0)
    plain, model = both(
        Transformer2DModel(2, 8, 16, norm_num_groups=4, use_linear_projection=flat, cross_attention_dim=12),
        dtype,
    )
    given = states(2, 16, 6, 4, dtype=dtype).to(memory_format=torch.channels_last)
    text = states(2, 5, 12, dtype=dtype)
    kept = given.clone()
    with torch.no_grad(), Names() as names:
        out = model(given, text).sample
    assert "clone" not in names.seen  # what .contiguous() does
    assert "div" not in names.seen
    assert torch.equal(given, kept)
    assert out.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(out, plain(given, text).sample, rtol=near, atol=near)


def test_packed_attention_hears_masks_hooks_and_lora() -> None:
    torch.manual_seed(0)
    plain, model = both(Attention(16, heads=2, dim_head=8), torch.float32)
    given, mask = states(2, 6, 16), torch.zeros(2, 6)
    mask[:, 3:] = -1e4
    with torch.no_grad():
        for asked in ({}, {"attention_mask": mask}, {"encoder_hidden_states": states(2, 3, 16)}):
            torch.testing.assert_close(model(given, **asked), plain(given, **asked), rtol=1e-5, atol=1e-5)
        before = model(given)
        hook = model.to_k.register_forward_hook(lambda layer, args, out: out * 2)
        assert (model(given) - before).abs().max() > 1e-3
        hook.remove()
        for each in (plain, model):
            torch.manual_seed(1)
            config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
            inject_adapter_in_model(config, each)
        torch.testing.assert_close(model(given), plain(given), rtol=1e-5, atol=1e-5)
        assert (model(given) - before).abs().max() > 0.1


@pytest.mark.parametrize(
    "options", [{"residual_connection": True}, {"norm_num_groups": 4}, {"qk_norm": "layer_norm"}]
)
def test_attentions_of_other_kinds_stay_as_they_are(options: dict[str, object]) -> None:
    _, model = both(Attention(16, heads=2, dim_head=8, **options), torch.float32)
    assert type(model) is Attention


def unets(*down: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """A small UNet, plain and packed."""
    torch.manual_seed(0)
    plain = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=12, attention_head_dim=2, down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)), **options,
    ).eval().requires_grad_(False)  # fmt: skip
    model = copy.deepcopy(plain)
    pack(model)
    return plain, model


CROSS, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"


@pytest.mark.parametrize("equal", [True, False])
def test_equal_rows_are_computed_once_up_to_the_text(equal: bool) -> None:
    plain, model = unets(CROSS, DOWN)
    given = states(1, 4, 8, 8).repeat(3, 1, 1, 1)
    given[2] += 0 if equal else 0.1
    kept, text = given.clone(), states(3, 5, 12)
    with torch.no_grad(), Names() as names:
        out = model(given, 7, text).sample
    torch.testing.assert_close(out, plain(given, 7, text).sample, rtol=1e-5, atol=1e-5)
    assert torch.equal(given, kept)
    assert (out[0] - out[1]).abs().max() > 1e-3
    convolved, attended = names.rows_of("_convolution_pointwise"), names.rows_of("dot_product")
    first = 1 if equal else 3
    assert convolved[:4] == [first] * 4  # conv_in, a residual block and proj_in
    assert convolved[4] == 3
    assert attended[:2] == [first, 3]  # over itself, over the text


def test_rows_at_different_timesteps_are_not_merged() -> None:
    plain, model = unets(CROSS, DOWN)
    given, text = states(1, 4, 8, 8).repeat(2, 1, 1, 1), states(1, 5, 12).repeat(2, 1, 1)
    out = model(given, torch.tensor([7, 400]), text).sample
    torch.testing.assert_close(out, plain(given, torch.tensor([7, 400]), text).sample, rtol=1e-5, atol=1e-5)
    assert (out[0] - out[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("down", "side"), [((CROSS, DOWN), 8), ((DOWN, CROSS), 4)])
def test_a_t2i_adapters_features_are_added_to_equal_rows(down: tuple[str, str], side: int) -> None:
    plain, model = unets(*down)
    given, text = states(1, 4, 8, 8).repeat(2, 1, 1, 1), states(2, 5, 12)
    outs = []
    for each in (plain, model):
        features = [states(2, 16, side, side), states(2, 32, 4, 4)]
        with torch.no_grad():
            outs.append(each(given, 7, text, down_intrablock_additional_residuals=features).sample)
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)


def test_a_lora_of_a_packed_convolution_is_added() -> None:
    plain, model = models()
    given = states(1, 4, 8, 8)
    before, _ = ran(model, given)
    for each in (plain, model):
        torch.manual_seed(1)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["layers.0"], init_lora_weights=False), each)
    out, _ = ran(model, given)
    torch.testing.assert_close(out, ran(plain, given)[0], rtol=1e-5, atol=1e-5)
    assert (out - before).abs().max() > 0.01
