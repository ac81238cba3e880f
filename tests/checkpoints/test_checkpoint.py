"""Adapter files: every published layout is recognised, everything else is refused in one clear line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.catalog import AdapterRow, adapters
from imprompt.catalog.variants import VARIANTS
from imprompt.checkpoints import identify
from imprompt.checkpoints.checkpoint import Checkpoint, read, write
from imprompt.checkpoints.convert import convert
from imprompt.checkpoints.inspect import inspect
from imprompt.errors import AdapterMismatch, ImpromptError, InputError, ModelError, UsageError
from imprompt.io import sha256
from layouts import (
    PUBLISHED,
    SMALL,
    SMALL_TRANSFORMERS,
    TRANSFORMERS,
    Layout,
    face_plus,
    layers,
    linear,
    lora,
    resampler,
    small,
    sparse,
)
from tiny import random_adapter_state, tiny_unet

State = dict[str, dict[str, torch.Tensor]]


def same(one: State, other: State) -> bool:
    return all(
        one[part].keys() == other[part].keys()
        and all(
            one[part][k].dtype == v.dtype and torch.equal(one[part][k], v) for k, v in other[part].items()
        )
        for part in ("image_proj", "ip_adapter")
    )


def one_line(error: pytest.ExceptionInfo[ImpromptError]) -> bool:
    return "\n" not in str(error.value) and "KeyError" not in str(error.value)


# ---- what is published


@pytest.mark.parametrize("layout", PUBLISHED, ids=lambda layout: layout.name)
def test_every_published_file_is_recognised_by_its_header(layout: Layout, tmp_path: Path) -> None:
    found = inspect(layout.write(tmp_path), weights=False)
    assert found.variant == layout.variant
    assert found.published == (layout.name,)
    assert found.base == (layout.base or layout.family)
    assert sum(found.parameters.values()) == layout.parameters
    assert (found.tokens, found.lora_rank) == (layout.tokens, layout.rank)
    assert found.layers == {"sd15": 16, "sdxl": 70}[layout.family]
    assert found.finite is None
    assert json.loads(json.dumps(found.to_dict()))["published"] == [layout.name]
    assert layout.name in str(found)


@pytest.mark.parametrize("layout", PUBLISHED, ids=lambda layout: layout.name)
def test_a_renamed_file_says_all_it_may_be_and_how_they_differ(layout: Layout, tmp_path: Path) -> None:
    found = inspect(layout.write(tmp_path, "renamed"), weights=False)
    assert set(found.published) == set(layout.shares or (layout.name,))
    assert len(found.differs) == len(found.published)
    assert layout.variant in found.variant.split(" or ")
    plus = layout.variant in ("faceid-plus", "faceid-plusv2") and layout.family == "sd15"
    assert found.variant == ("faceid-plus or faceid-plusv2" if plus else layout.variant)
    assert all(name in str(found) for name in found.published)


NO_LISTING = ("kolors_ipa-faceid-plus", "sd35-large_ip-adapter", "flux-dev_ip-adapter", "flux1-redux-dev")


def test_the_catalogue_has_each_published_file_once_and_the_tests_know_them_all() -> None:
    rows = [row for row in adapters().values() if not row.bundled]
    assert [row.published for row in rows] == list(dict.fromkeys(row.published for row in rows))
    assert {row.published for row in rows} == {layout.name for layout in PUBLISHED} | TRANSFORMERS.keys()
    hashes = [row.sha256 for row in rows if row.published not in NO_LISTING]
    hashes += [row.lora_sha256 for row in rows if row.lora_sha256]
    assert len(set(hashes)) == len(hashes)
    assert all(sha256 and len(sha256) == 64 and int(sha256, 16) for sha256 in hashes)


def test_full_size_weights_hold_what_their_layout_says() -> None:
    layout = PUBLISHED[0]
    tensors = {key: torch.empty(shape, device="meta") for key, shape in layout.shapes.items()}
    found = read(tensors, name="ip-adapter_sd15_light")
    assert found.variant is VARIANTS["linear"]
    assert found.published is not None
    assert found.published.published == "ip-adapter_sd15_light"
    assert (found.tokens, found.cross_dim, found.feature_width) == (4, 768, 1024)
    assert found.layers == tuple(range(1, 32, 2))


def test_a_hash_outweighs_a_lying_name_and_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = next(each for each in PUBLISHED if each.name == "ip-adapter-faceid-plus_sd15")
    path = layout.write(tmp_path, "ip-adapter-faceid-plus_sd15", {"imprompt.variant": "faceid-plus"})
    assert inspect(path, weights=False).evidence == "metadata"
    size, digest = path.stat().st_size, sha256(path)
    known = AdapterRow(
        "ours", "me/mine", "Apache-2.0", "a.bin", "sd15", "faceid-plusv2", 4, "a test's", bytes=size,
        sha256=digest, published="ours",
    )  # fmt: skip
    monkeypatch.setattr(identify, "adapters", lambda: adapters() | {"ours": known})
    found = inspect(path)
    assert (found.variant, found.published, found.evidence) == ("faceid-plusv2", ("ours",), "sha256")


def test_metadata_outweighs_the_name(tmp_path: Path) -> None:
    layout = next(each for each in PUBLISHED if each.name == "ip-adapter-faceid-plus_sd15")
    path = layout.write(tmp_path, metadata={"imprompt.variant": "faceid-plusv2"})
    assert inspect(path, weights=False).variant == "faceid-plusv2"


def test_metadata_that_contradicts_the_weights_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    sparse(path, {k: ("F16", s) for k, s in PUBLISHED[0].shapes.items()}, {"imprompt.variant": "full-face"})
    with pytest.raises(ModelError, match=r"says it is 'full-face'.*linear"):
        read(path)


def test_what_shapes_cannot_tell_is_asked_and_can_be_said() -> None:
    state = small("faceid-plus")
    with pytest.raises(ModelError, match="faceid-plus or faceid-plusv2") as error:
        read(state)
    assert "s_scale" in str(error.value)
    assert one_line(error)
    assert read(state, variant="faceid-plusv2").variant.shortcut
    assert not read(state, variant="ip-adapter-faceid-plus_sd15").variant.shortcut
    assert read(state, name="my-FaceID-PlusV2-tuned").variant.shortcut
    with pytest.raises(ModelError, match="cannot be 'linear'"):
        read(state, variant="linear")
    with pytest.raises(UsageError, match="no variant 'plus3'"):
        read(state, variant="plus3")


def test_an_adapter_of_another_base_is_read_and_no_family_is_made_up(tmp_path: Path) -> None:
    write(read(small("linear")), tmp_path / "a.safetensors")
    found = inspect(tmp_path / "a.safetensors")
    assert (found.base, found.published, found.finite) == ("other", (), True)
    assert found.layers == 3
    assert "nothing known" in str(found)


def test_a_face_adapters_lora_is_kept_apart_and_written_again(tmp_path: Path) -> None:
    state = small("faceid")
    more = {k: torch.randn(s) for k, s in lora([4, 6, 4], 8, 2).items()}
    found = read({"image_proj": state["image_proj"], "ip_adapter": state["ip_adapter"] | more})
    assert found.lora.keys() == more.keys()
    assert found.state["ip_adapter"].keys() == state["ip_adapter"].keys()
    write(found, tmp_path / "a.safetensors")
    assert inspect(tmp_path / "a.safetensors").lora_rank == 2
    again = read(tmp_path / "a.safetensors")
    assert all(torch.equal(again.lora[key], value) for key, value in more.items())


# ---- adapters of transformers


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_published_adapter_of_a_transformer_is_recognised_by_its_header(
    name: str, tmp_path: Path
) -> None:
    variant, family, shapes, millions = TRANSFORMERS[name]
    path = tmp_path / "renamed.safetensors"
    sparse(path, {key: ("BF16", shape) for key, shape in shapes.items()})
    found = inspect(path, weights=False)
    assert (found.variant, found.base, found.published) == (variant, family, (name,))
    assert found.backbone == {"flux": "flux", "sd35": "sd3"}[family]
    assert round(sum(found.parameters.values()) / 1e6, 1) == millions


@pytest.mark.parametrize("variant", SMALL_TRANSFORMERS)
def test_an_adapter_of_a_transformer_is_read_in_one_form_and_written_under_its_published_names(
    variant: str, tmp_path: Path
) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = SMALL_TRANSFORMERS[variant]
    tensors = {key: torch.randn(shape, generator=random) for key, shape in shapes.items()}
    save_file(tensors, tmp_path / "in.safetensors")
    found = read(tmp_path / "in.safetensors")
    assert found.variant.name == variant
    assert found.backbone == ("sd3" if variant == "instantx-sd3" else "flux")
    assert found.layers == tuple(
        range({"xlabs": 2, "instantx-flux": 4, "instantx-sd3": 2, "redux": 0}[variant])
    )
    write(found, tmp_path / "out.safetensors")
    again = load_file(tmp_path / "out.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], value) for key, value in tensors.items())
    torch.save(
        {"image_proj": found.state["image_proj"], "ip_adapter": found.state["ip_adapter"]}, tmp_path / "a.bin"
    )
    assert convert(tmp_path / "a.bin", tmp_path / "b.safetensors").variant == variant
    assert same(read(tmp_path / "b.safetensors").state, found.state)


def test_a_site_has_its_weights_by_name() -> None:
    found = {}
    for variant in ("xlabs", "instantx-flux", "instantx-sd3"):
        tensors = {key: torch.ones(shape) for key, shape in SMALL_TRANSFORMERS[variant].items()}
        found[variant] = read(tensors).site(1)
    assert {key: tuple(w.shape) for key, w in found["xlabs"].items()} == {
        "to_k_ip.weight": (6, 8), "to_k_ip.bias": (6,), "to_v_ip.weight": (6, 8), "to_v_ip.bias": (6,)
    }  # fmt: skip
    assert found["instantx-flux"].keys() == {"to_k_ip.weight", "to_v_ip.weight"}
    assert {key: tuple(w.shape) for key, w in found["instantx-sd3"].items()} == {
        "norm_ip.linear.weight": (16, 16), "norm_ip.linear.bias": (16,), "to_k_ip.weight": (8, 8),
        "to_v_ip.weight": (8, 8), "norm_q.weight": (4,), "norm_k.weight": (4,), "norm_ip_k.weight": (4,),
    }  # fmt: skip


DAMAGED = {
    "a bias missing": ("xlabs", "double_blocks.1.processor.ip_adapter_double_stream_v_proj.bias", None,
                       r"missing: '1\.to_v_ip\.bias'"),
    "a bias too long": ("xlabs", "double_blocks.1.processor.ip_adapter_double_stream_k_proj.bias", (7,),
                        r"1\.to_k_ip\.bias \(7,\) instead of \(6,\)"),
    "a site missing": ("instantx-flux", "ip_adapter.2.to_k_ip.weight", None, r"missing: '2\.to_k_ip"),
    "heads differ": ("instantx-sd3", "ip_adapter.1.norm_k.weight", (5,),
                     r"1\.norm_k\.weight \(5,\) instead of \(4,\)"),
    "modulation of other width": ("instantx-sd3", "ip_adapter.1.norm_ip.linear.weight", (16, 9),
                                  r"1\.norm_ip\.linear\.weight \(16, 9\) instead of \(16, 16\)"),
    "half a projection": ("redux", "redux_down.weight", None, r"no 'redux_down\.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_adapter_of_a_transformer_is_refused_with_what_is_wrong(what: str) -> None:
    variant, key, shape, message = DAMAGED[what]
    shapes = {k: s for k, s in SMALL_TRANSFORMERS[variant].items() if k != key}
    if shape is not None:
        shapes[key] = shape
    with pytest.raises(ModelError, match=message) as error:
        read({k: torch.ones(s) for k, s in shapes.items()}, name="mine")
    assert one_line(error)


def test_an_adapter_of_a_transformer_is_refused_on_a_unet_with_both_named() -> None:
    tensors = {
        key: torch.empty(shape, device="meta") for key, shape in TRANSFORMERS["flux-ip-adapter"][2].items()
    }
    adapter = IPAdapter(read(tensors, name="x"))
    with pytest.raises(AdapterMismatch, match=r"made for FLUX\.1.*UNet2DConditionModel"):
        adapter.attach(tiny_unet())


# ---- reading and writing


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@settings(max_examples=40, deadline=None)
@given(
    variant=st.sampled_from([*SMALL, "wide"]),
    sizes=st.tuples(*[st.integers(1, 5)] * 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_what_is_written_is_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    variant: str,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("round") / "a.safetensors"
    tokens, cross, width, count = sizes
    if variant == "wide":
        random = torch.Generator().manual_seed(seed)
        shapes = (linear(cross, width, tokens), layers([width] * count, cross))
        parts = [{k: torch.randn(s, generator=random).to(dtype) for k, s in part.items()} for part in shapes]
        state = dict(zip(("image_proj", "ip_adapter"), parts, strict=True))
    else:
        state = small(variant, seed=seed, dtype=dtype)
    first = read(state, variant=None if variant == "wide" else variant, name="a")
    write(first, path)
    second = read(path)
    assert same(second.state, state)
    for each in ("variant", "tokens", "cross_dim", "feature_width", "layers", "name"):
        assert getattr(first, each) == getattr(second, each)
    assert second.source == str(path)
    assert list(path.parent.iterdir()) == [path]


def test_flat_and_nested_state_dicts_are_the_same() -> None:
    state = small("resampler")
    flat = {f"{part}.{key}": value for part, keys in state.items() for key, value in keys.items()}
    assert same(read(flat).state, state)
    assert read(state).state["image_proj"]["latents"] is state["image_proj"]["latents"], "nothing is copied"


def test_diffusers_loads_what_is_written(tmp_path: Path) -> None:
    unet = tiny_unet()
    state = random_adapter_state(unet, "plus")
    path = IPAdapter.from_state_dict(state).save_pretrained(tmp_path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["imprompt.variant"] == "resampler"
        loaded: State = {"image_proj": {}, "ip_adapter": {}}
        for key in file.keys():  # noqa: SIM118 - not a dict; split as diffusers' loader splits
            part = "image_proj" if key.startswith("image_proj.") else "ip_adapter"
            loaded[part][key.replace(f"{part}.", "")] = file.get_tensor(key)
    unet._load_ip_adapter_weights([loaded])
    assert same(loaded, state)


def test_weights_that_share_memory_are_written_whole(tmp_path: Path) -> None:
    state, big = small("linear"), torch.randn(12, 8)
    for part, rows in (("k", big[:4]), ("v", big[2:6])):
        state["ip_adapter"][f"1.to_{part}_ip.weight"] = rows
    state["ip_adapter"]["5.to_k_ip.weight"] = state["ip_adapter"]["5.to_v_ip.weight"]
    state["ip_adapter"]["3.to_k_ip.weight"] = torch.randn(8, 6).T
    write(read(state), tmp_path / "a.safetensors")
    assert same(read(tmp_path / "a.safetensors").state, state)


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(read(small("linear")), path)
    before = path.read_bytes()
    broken = read(small("linear", seed=1))
    broken.state["image_proj"]["norm.bias"][0] = float("nan")
    with pytest.raises(ModelError, match=r"image_proj\.norm\.bias.*not saved"):
        write(broken, path)
    with pytest.raises(UsageError, match="safetensors"):
        write(read(small("linear")), tmp_path / "a.bin")
    with pytest.raises(ModelError, match="cannot be written"):
        write(read(small("linear")), tmp_path / "nowhere" / "a.safetensors")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---- what is refused


def without(part: str, *keys: str) -> State:
    state = small("linear")
    return state | {part: {key: value for key, value in state[part].items() if key not in keys}}


def having(part: str, variant: str = "linear", **more: tuple[int, ...]) -> State:
    state = small(variant)
    return state | {part: state[part] | {key.replace("__", "."): torch.ones(s) for key, s in more.items()}}


REFUSED = {
    "nothing": ({}, "empty 'image_proj'"),
    "empty projection": (small("linear") | {"image_proj": {}}, "empty 'image_proj'"),
    "empty layers": (small("linear") | {"ip_adapter": {}}, "no to_k_ip and to_v_ip.*imprompt convert"),
    "no projection known": (
        {"image_proj": {"w": torch.ones(2)}, "ip_adapter": {}},
        "no known projection: .*'w'",
    ),
    "missing bias": (without("image_proj", "proj.bias"), r"missing: 'proj\.bias'"),
    "missing norm": (without("image_proj", "norm.weight"), r"no 'norm\.weight'"),
    "extra": (having("image_proj", extra__weight=(2,)), r"not expected: 'extra\.weight'"),
    "wrong shape": (having("image_proj", proj__bias=(3,)), r"proj\.bias \(3,\) instead of \(16,\)"),
    "wrong rank": (having("image_proj", proj__weight=(3,)), "2 non-zero dimensions"),
    "odd rows": (having("image_proj", proj__weight=(17, 6)), "17 rows, not a multiple of the width 8"),
    "a block missing": (
        {k: {n: w for n, w in v.items() if "layers.0" not in n} for k, v in small("resampler").items()},
        "not numbered 0 to 1",
    ),
    "unpaired": (without("ip_adapter", "3.to_v_ip.weight"), r"missing: '3\.to_v_ip\.weight'"),
    "a gap": (
        without("ip_adapter", "3.to_v_ip.weight", "3.to_k_ip.weight"),
        r"missing: '3\.to_k_ip\.weight'",
    ),
    "even": (
        having("ip_adapter", **{"2.to_k_ip.weight": (4, 8)}),
        r"even numbers are self-attention.*not expected: '2\.to_k_ip\.weight'",
    ),
    "a huge number": (
        having("ip_adapter", **{"99999999999.to_k_ip.weight": (4, 8)}),
        "numbers a layer 99999999999",
    ),
    "k unlike v": (
        having("ip_adapter", **{"3.to_k_ip.weight": (5, 8)}),
        r"3\.to_v_ip\.weight \(6, 8\) instead of \(5, 8\)",
    ),
    "a bias": (having("ip_adapter", **{"3.to_k_ip.bias": (6,)}), r"not expected: '3\.to_k_ip\.bias'"),
    "of two adapters": (
        {"image_proj": small("linear")["image_proj"], "ip_adapter": small("faceid-plus")["ip_adapter"]},
        "tokens of width 8, its layers read 64",
    ),
    "LoRA without a face": (
        having("ip_adapter", **lora([4, 6, 4], 8, 2)),
        "LoRA keys, which only face adapters have",
    ),
    "half a LoRA": (
        having("ip_adapter", "faceid", **{"0.to_q_lora.down.weight": (2, 4)}),
        "incomplete LoRA",
    ),
    "a LoRA of mixed ranks": (
        having("ip_adapter", "faceid", **(lora([4, 6, 4], 8, 2) | {"0.to_q_lora.down.weight": (3, 4)})),
        "mixed ranks",
    ),
    "a third part": (small("linear") | {"optimizer": {"step": torch.ones(1)}}, r"beside .*'optimizer\.step'"),
    "a number": (small("linear") | {"step": 3}, "a int at 'step'"),
    "a number as key": ({"image_proj": {1: torch.ones(2)}}, "keys are text"),
    "whole numbers": (
        {part: {k: w.long() for k, w in keys.items()} for part, keys in small("linear").items()},
        "weights that are not F64, F32, F16 or BF16",
    ),
    "sparse": (
        small("linear") | {"image_proj": {"proj.weight": torch.eye(3).to_sparse()}},
        r"sparse or quantised tensor at 'image_proj\.proj\.weight'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_faulty_adapter_is_refused_with_what_is_wrong(what: str) -> None:
    state, message = REFUSED[what]
    with pytest.raises(ModelError, match=message) as error:
        read(state, name="mine")
    assert one_line(error)
    assert error.value.exit_code == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_finite_are_refused_by_name(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    state = small("linear", dtype=dtype)
    state["ip_adapter"]["3.to_v_ip.weight"][1, 2] = value
    with pytest.raises(ModelError, match=r"NaN or infinite weights in 'ip_adapter\.3\.to_v_ip\.weight'"):
        read(state)
    flat = {f"{part}.{key}": w.contiguous() for part, keys in state.items() for key, w in keys.items()}
    save_file(flat, tmp_path / "a.safetensors")
    found = inspect(tmp_path / "a.safetensors")
    assert found.finite is False
    assert found.not_finite == ("ip_adapter.3.to_v_ip.weight",)
    assert "NO: 'ip_adapter.3.to_v_ip.weight'" in str(found)
    assert inspect(tmp_path / "a.safetensors", weights=False).finite is None


FOREIGN = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "a LoRA",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight": "a LoRA",
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": "a LoRA",
    "base_model.model.blocks.0.lora_B.default.weight": "a LoRA",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": "a LoRA",
    "control_model.input_blocks.0.0.weight": "a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "controlnet_down_blocks.0.weight": "a ControlNet",
    "adapter.body.0.resnets.0.block1.weight": "a T2I-Adapter",
    "body.0.block1.weight": "a T2I-Adapter",
    "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": "a motion module",
    "model.diffusion_model.input_blocks.0.0.weight": "a whole Stable Diffusion checkpoint",
    "first_stage_model.decoder.conv_in.weight": "a whole Stable Diffusion checkpoint",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": "a whole Stable",
    "down_blocks.0.attentions.0.proj_in.weight": "a UNet",
    "double_blocks.0.img_attn.proj.weight": "a diffusion transformer",
    "transformer_blocks.0.attn.to_q.weight": "a diffusion transformer",
    "encoder.conv_in.weight": "a VAE",
    "vision_model.encoder.layers.0.mlp.fc1.weight": "an image encoder",
    "text_model.embeddings.token_embedding.weight": "a text encoder",
    "emb_params": "a textual inversion",
    "clip_g": "a textual inversion",
    "<cat-toy>": "a textual inversion",
    "id_adapter.latents": "a PuLID adapter",
    "id_adapter_attn_layers.0.id_to_k.weight": "a PuLID adapter",
    "pulid_ca.0.norm1.weight": "a PuLID adapter",
    "image_proj_model.proj.weight": "a training script's checkpoint: 'imprompt convert'",
}


@pytest.mark.parametrize("key", FOREIGN)
def test_a_file_of_another_kind_is_told_what_it_is(key: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    sparse(path, {key: ("F16", (2, 2)), "other.weight": ("F16", (2,))})
    for reader in (read, inspect):
        with pytest.raises(ModelError, match=FOREIGN[key]) as error:
            reader(path)
        assert one_line(error)


@pytest.mark.parametrize("variant", SMALL)
def test_no_adapter_is_taken_for_a_file_of_another_kind(variant: str) -> None:
    assert read(small(variant), variant=variant).variant.name == variant


# ---- converting


def pickled(content: object, path: Path, **how: bool) -> Path:
    torch.save(content, path, **how)
    return path


@pytest.mark.parametrize("variant", SMALL)
def test_a_pickled_adapter_becomes_safetensors_with_the_same_weights(variant: str, tmp_path: Path) -> None:
    state = small(variant, dtype=torch.float16)
    source, target = pickled(state, tmp_path / "mine.bin"), tmp_path / "mine.safetensors"
    found = convert(source, target, variant=variant)
    assert found.variant == variant
    loaded = read(target)
    assert loaded.variant.name == variant
    assert same(loaded.state, state)
    assert loaded.metadata["imprompt.source_sha256"] == sha256(source)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.bin", "mine.safetensors"}


def test_a_published_pickles_name_goes_into_the_converted_file(tmp_path: Path) -> None:
    state: State = {"image_proj": {}, "ip_adapter": {}}
    for key, shape in PUBLISHED[0].shapes.items():
        part, _, rest = key.partition(".")
        state[part][rest] = torch.zeros(1, dtype=torch.float16).expand(shape)  # one number on the disk
    source = pickled(state, tmp_path / "ip-adapter_sd15_light.bin")
    assert source.stat().st_size < 200_000
    convert(source, tmp_path / "renamed.safetensors")
    found = inspect(tmp_path / "renamed.safetensors")
    assert (found.published, found.evidence) == (("ip-adapter_sd15_light",), "metadata")


def test_what_a_file_says_of_itself_is_kept_and_only_converted_files_are_replaced(tmp_path: Path) -> None:
    state = small("faceid-plus")
    flat = {f"{part}.{key}": w for part, keys in state.items() for key, w in keys.items()}
    noted = {"imprompt.image_encoder": "lab/tower", "imprompt.variant": "faceid-plusv2", "imprompt.step": "7"}
    source, target = tmp_path / "run.safetensors", tmp_path / "new" / "adapter.safetensors"
    save_file(flat, source, noted)
    for _ in range(2):
        convert(source, target)
        found = read(target)
        assert {name: found.metadata[name] for name in noted} == noted
        assert found.metadata["imprompt.source_sha256"] == sha256(source)
    trained = source.read_bytes()
    with pytest.raises(InputError, match="was not converted"):
        convert(target, source)
    (tmp_path / "same.safetensors").hardlink_to(source)
    with pytest.raises(InputError, match="is read in this run"):
        convert(source, tmp_path / "same.safetensors", overwrite=True)
    assert source.read_bytes() == trained
    convert(target, source, overwrite=True)
    assert same(read(source).state, state)


def test_a_lora_that_does_not_read_back_as_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(checkpoint: Checkpoint, path: Path) -> None:
        """As a disk does that loses a bit."""
        name = next(iter(checkpoint.lora))
        write(replace(checkpoint, lora={**checkpoint.lora, name: checkpoint.lora[name] + 1}), path)

    monkeypatch.setattr("imprompt.checkpoints.convert.write", written)
    state = small("faceid")
    state["ip_adapter"] |= {key: torch.randn(shape) for key, shape in lora([4, 6, 4], 8, 2).items()}
    source = pickled(state, tmp_path / "mine.bin")
    with pytest.raises(ModelError, match=r"does not read back as written: 'ip_adapter\..*lora"):
        convert(source, tmp_path / "mine.safetensors", variant="faceid")


def test_of_a_folder_the_adapter_in_it_is_converted(tmp_path: Path) -> None:
    state, run = small("linear"), tmp_path / "run"
    flat = {f"{part}.{key}": w for part, keys in state.items() for key, w in keys.items()}
    run.mkdir()
    source = pickled(state, run / "old.bin")
    convert(run, tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors").metadata["imprompt.source_sha256"] == sha256(source)
    save_file(flat, run / "ip-adapter.safetensors", {"imprompt.step": "7"})
    save_file(flat, run / "checkpoint-9.safetensors")
    convert(run, tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors").metadata["imprompt.step"] == "7"
    with pytest.raises(UsageError, match="another target"):
        convert(run, run / "ip-adapter.safetensors", overwrite=True)
    save_file(flat, run / "other.safetensors")
    with pytest.raises(ModelError, match=r"holds 2 .safetensors files; name the file itself"):
        convert(run, tmp_path / "a.safetensors")


def test_old_and_wrapped_pickles_are_read_too(tmp_path: Path) -> None:
    state = small("linear")
    old = pickled(state, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    wrapped = pickled({"state_dict": state, "epoch": 3}, tmp_path / "wrapped.pt")
    flat = {f"{part}.{key}": w for part, keys in state.items() for key, w in keys.items()}
    save_file(flat, tmp_path / "flat.safetensors")
    for source in (old, wrapped, tmp_path / "flat.safetensors"):
        convert(source, tmp_path / "a.safetensors")
        assert same(read(tmp_path / "a.safetensors").state, state)


def training_checkpoint(
    family: str, *, shared: str, prefix: str = "", face: bool = False
) -> tuple[dict, State]:
    """As the reference scripts save it; ``shared`` says under which names the adapter's layers were kept."""
    unet = tiny_unet(family)
    state = random_adapter_state(unet, "linear")
    if face:
        cross = unet.config.cross_attention_dim
        state["image_proj"] = {k: torch.randn(s) for k, s in face_plus_shapes(cross).items()}
    saved = {f"unet.{key}": value for key, value in unet.state_dict().items()}
    saved |= {f"image_proj_model.{key}": value for key, value in state["image_proj"].items()}
    more: dict[str, torch.Tensor] = {}
    for n, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        mine = {k: w for k, w in state["ip_adapter"].items() if k.startswith(f"{n}.")}
        if face:
            for part in ("q", "k", "v", "out"):
                wide = attention.to_k.in_features if part in "kv" else attention.to_q.out_features
                mine[f"{n}.to_{part}_lora.down.weight"] = torch.randn(2, wide)
                mine[f"{n}.to_{part}_lora.up.weight"] = torch.randn(attention.to_q.out_features, 2)
        more |= mine
        for key, value in mine.items():
            if shared in ("unet", "both"):
                saved[f"unet.{name}.{key.partition('.')[2]}"] = value
            if shared in ("adapter_modules", "both"):
                saved[f"adapter_modules.{key}"] = value
    return {prefix + k: w for k, w in saved.items()}, {"image_proj": state["image_proj"], "ip_adapter": more}


def face_plus_shapes(cross: int) -> dict[str, tuple[int, ...]]:
    return face_plus(64, 5, 6, depth=1) if cross == 64 else {}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("shared", ["unet", "adapter_modules", "both"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_adapter_is_taken_out_of_a_training_checkpoint(
    family: str, shared: str, prefix: str, tmp_path: Path
) -> None:
    saved, state = training_checkpoint(family, shared=shared, prefix=prefix)
    source = pickled(saved, tmp_path / "pytorch_model.bin")
    convert(source, tmp_path / "a.safetensors")
    assert same(read(tmp_path / "a.safetensors").state, state)
    save_file({key: value.contiguous().clone() for key, value in saved.items()}, tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match="imprompt convert"):
        read(tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "b.safetensors")
    assert same(read(tmp_path / "b.safetensors").state, state)


def test_a_face_adapters_training_checkpoint_keeps_its_lora(tmp_path: Path) -> None:
    saved, state = training_checkpoint("sdxl", shared="unet", face=True)
    convert(pickled(saved, tmp_path / "m.bin"), tmp_path / "a.safetensors", variant="faceid-plusv2")
    found = read(tmp_path / "a.safetensors")
    assert found.variant.shortcut
    assert (found.state["ip_adapter"] | found.lora).keys() == state["ip_adapter"].keys()
    assert all(torch.equal(found.lora[k], state["ip_adapter"][k]) for k in found.lora)


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return exec, (f"open({str(self.path)!r}, 'w')",)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    state = small("linear") | {"surprise": Malice(tmp_path / "ran")}
    for how in (True, False):
        source = pickled(state, tmp_path / "evil.bin", _use_new_zipfile_serialization=how)
        with pytest.raises(ModelError, match="nothing in it was run") as error:
            convert(source, tmp_path / "a.safetensors")
        assert one_line(error)
        assert [path.name for path in tmp_path.iterdir()] == ["evil.bin"]


def test_converting_what_is_no_adapter_leaves_nothing(tmp_path: Path) -> None:
    whole = pickled(small("linear"), tmp_path / "good.bin").read_bytes()
    files = {
        "cut.bin": (whole[:-500], "damaged|truncated|more than tensors"),
        "half.bin": (whole[: len(whole) // 2], "damaged|truncated|more than tensors"),
        "empty.bin": (b"", "is empty"),
        "text.bin": (b"hello", "not a torch pickle"),
        "page.ckpt": (b"<!DOCTYPE html><html>", "not a torch pickle"),
    }
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"what was there before")
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=message) as error:
            convert(tmp_path / name, target, overwrite=True)
        assert one_line(error)
    contents = {
        "list.bin": ([torch.ones(2)], "a list; a table of tensors was expected"),
        "step.bin": (small("linear") | {"step": 3}, "a int at 'step'"),
        "nan.bin": (small("linear") | {"image_proj": {"proj.weight": torch.ones(2)}}, "non-zero dimensions"),
        "lora.bin": ({"unet.a.lora_A.weight": torch.ones(2, 2)}, "a LoRA"),
        "which.bin": (small("faceid-plus"), "may be faceid-plus or faceid-plusv2"),
    }
    for name, (content, message) in contents.items():
        with pytest.raises(ModelError, match=message):
            convert(pickled(content, tmp_path / name), target, overwrite=True)
    with pytest.raises(ModelError, match="no file"):
        convert(tmp_path / "missing.bin", target, overwrite=True)
    with pytest.raises(InputError, match="was not converted; give another name, or --overwrite"):
        convert(tmp_path / "good.bin", target)
    with pytest.raises(UsageError, match="another target"):
        convert(target, target)
    with pytest.raises(UsageError, match=r"written as \.safetensors"):
        convert(tmp_path / "good.bin", tmp_path / "a.bin")
    assert target.read_bytes() == b"what was there before"
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*"))


def test_inspect_takes_files_only() -> None:
    with pytest.raises((ImpromptError, TypeError)):
        inspect({})  # type: ignore[arg-type]


def test_a_checkpoint_says_what_an_adapter_needs() -> None:
    found = read({"image_proj": zeros(resampler(8, 6, 16, 1)), "ip_adapter": zeros(layers([4], 8))})
    assert isinstance(found, Checkpoint)
    assert (found.variant.feature, found.variant.negative) == ("hidden", "encoded_zeros")
    assert (found.tokens, found.cross_dim, found.feature_width, found.layers) == (16, 8, 6, (1,))


def zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(shape) for key, shape in shapes.items()}
