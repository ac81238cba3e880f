"""An adapter's life: loaded, attached, prompted, trained, saved, taken off, and what can go wrong with it."""

import gc
import math
import weakref
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from compiled import run_unchecked
from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.clip import ImageEncoder
from imprompt.errors import (
    AdapterMismatch,
    EncoderMismatch,
    ImpromptError,
    InputError,
    ModelError,
    UsageError,
)
from imprompt.schema.prompt import ImagePrompt
from tiny import (
    HIDDEN,
    PICTURE,
    POOLED,
    picture,
    random_adapter_state,
    tiny_encoder,
    tiny_sd,
    tiny_sdxl,
    tiny_unet,
)

KINDS = {"linear": "linear", "resampler": "plus"}


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    pipe = tiny_sd()
    model, processor = tiny_encoder()
    pipe.register_modules(image_encoder=model, feature_extractor=processor)
    return pipe


@pytest.fixture
def adapter(pipe: StableDiffusionPipeline) -> IPAdapter:
    return IPAdapter.from_state_dict(random_adapter_state(pipe.unet))


def draw(
    pipe: StableDiffusionPipeline, count: int = 1, each: int = 1, seeds: range | None = None
) -> np.ndarray:
    seeds = range(count * each) if seeds is None else seeds
    return pipe(
        ["a cat"] * count,
        num_images_per_prompt=each,
        num_inference_steps=2,
        width=PICTURE,
        height=PICTURE,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images


def save_encoder(folder: Path, pooled: int = POOLED, hidden: int = HIDDEN) -> None:
    model, processor = tiny_encoder(pooled, hidden)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# ---- attach and detach


def test_a_hundred_times_on_and_off_leave_nothing_behind(
    pipe: StableDiffusionPipeline, adapter: IPAdapter
) -> None:
    before, found = draw(pipe), dict(pipe.unet.attn_processors)
    state = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    for _ in range(100):
        adapter.attach(pipe)
        adapter.detach()
    adapter.attach(pipe).set_prompt(picture(1))
    assert not np.array_equal(draw(pipe), before)
    assert pipe.unet.state_dict().keys() == state.keys(), "adapter weights must not become the UNet's"
    recording = weakref.ref(pipe.unet.attn_processors[next(n for n in found if "attn2" in n)])
    adapter.detach()
    assert np.array_equal(draw(pipe), before)
    assert all(found[name] is processor for name, processor in pipe.unet.attn_processors.items())
    assert not pipe.unet._forward_pre_hooks
    assert recording() is None
    assert not adapter.attached
    adapter.detach()  # once more is nothing


def test_an_adapter_and_its_pipeline_free_each_other_without_the_cycle_collector(
    pipe: StableDiffusionPipeline,
) -> None:
    adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet)).attach(pipe)
    adapter.set_prompt(picture(1))
    draw(pipe)
    recording = weakref.ref(adapter)
    gc.collect()
    gc.disable()
    try:
        del adapter
        assert recording() is not None, "the pipeline it is attached to keeps it"
        pipe.unet = None
        assert recording() is None
    finally:
        gc.enable()


def test_an_empty_prompt_and_a_cleared_one_change_nothing(
    pipe: StableDiffusionPipeline, adapter: IPAdapter
) -> None:
    before = draw(pipe)
    adapter.attach(pipe)
    assert np.array_equal(draw(pipe), before)
    adapter.set_prompt(picture(1))
    assert not np.array_equal(draw(pipe), before)
    adapter.clear_prompt()
    assert np.array_equal(draw(pipe), before)


def test_an_adapter_of_another_base_is_refused_naming_both(adapter: IPAdapter) -> None:
    pipe = tiny_sdxl()
    found = dict(pipe.unet.attn_processors)
    with pytest.raises(AdapterMismatch, match=r"4 cross-attentions of width 32.*XL.*8 .*64"):
        adapter.attach(pipe)
    assert pipe.unet.attn_processors == found
    assert not pipe.unet._forward_pre_hooks
    assert not adapter.attached


def test_what_has_no_unet_is_refused(adapter: IPAdapter) -> None:
    with pytest.raises(AdapterMismatch, match="SimpleNamespace has none"):
        adapter.attach(SimpleNamespace(transformer=torch.nn.Identity()))


def test_one_adapter_is_on_one_unet_at_a_time(pipe: StableDiffusionPipeline, adapter: IPAdapter) -> None:
    adapter.attach(pipe)
    with pytest.raises(UsageError, match="another UNet"):
        adapter.attach(tiny_sd())
    adapter.attach(pipe)
    adapter.detach()
    assert not pipe.unet._forward_pre_hooks


def test_pipelines_that_share_a_unet_take_turns(pipe: StableDiffusionPipeline, adapter: IPAdapter) -> None:
    adapter.attach(pipe).set_prompt(picture(1))
    first = draw(pipe)
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    adapter.attach(other)
    other("a cat", image=picture(2), num_inference_steps=2, guidance_scale=1.0)
    adapter.attach(pipe)
    assert np.array_equal(draw(pipe), first)


def test_a_pipeline_around_the_same_unet_draws_the_same(
    pipe: StableDiffusionPipeline, adapter: IPAdapter
) -> None:
    adapter.attach(pipe).set_prompt(picture(1))
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    np.testing.assert_array_equal(draw(other), draw(pipe))


def test_diffusers_own_adapter_must_leave_first(pipe: StableDiffusionPipeline, adapter: IPAdapter) -> None:
    pipe.load_ip_adapter(
        random_adapter_state(pipe.unet), subfolder=None, weight_name=None, image_encoder_folder=None
    )
    with pytest.raises(AdapterMismatch, match="unload_ip_adapter"):
        adapter.attach(pipe)


def test_weights_are_raised_to_the_unets_precision_but_never_lowered(pipe: StableDiffusionPipeline) -> None:
    adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet)).to(dtype=torch.float16)
    assert adapter.attach(pipe).dtype == torch.float32
    adapter.detach()
    adapter.to(dtype=torch.float64)
    assert adapter.attach(pipe).dtype == torch.float64


def test_keys_and_values_are_made_where_the_tokens_are_and_their_weights_stay(
    pipe: StableDiffusionPipeline, adapter: IPAdapter
) -> None:
    adapter.attach(pipe).to("cpu")
    tokens = torch.zeros(1, 4, adapter.checkpoint.cross_dim, device="meta")  # meta refuses a CPU's tensors
    site = next(site for site in cross_attentions(pipe.unet) if adapter.has_site(site.index))
    made = adapter.key_value(site.index)(tokens, 2, torch.float32)
    assert [part.device.type for part in made] == ["meta", "meta"]
    assert {weight.device.type for weight in adapter.parameters()} == {"cpu"}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_an_adapter_whose_weights_wait_draws_the_same(
    pipe: StableDiffusionPipeline, adapter: IPAdapter, first: bool, own: bool
) -> None:
    if own:
        adapter.image_encoder = ImageEncoder(*tiny_encoder())
    adapter.attach(pipe).set_prompt([picture(1), picture(2)])
    wanted = draw(pipe)
    adapter.detach()
    weights = list(adapter.parameters())
    if first:
        adapter.enable_cpu_offload("cpu").attach(pipe)
    else:
        adapter.attach(pipe).enable_cpu_offload("cpu")
    assert adapter.execution_device == torch.device("cpu")
    for shown in (picture(3), [picture(1), picture(2)]):
        adapter.set_prompt(shown)
    np.testing.assert_array_equal(draw(pipe), wanted)
    assert all(one is other for one, other in zip(adapter.parameters(), weights, strict=True))
    adapter.detach()
    adapter.attach(pipe).set_prompt([picture(1), picture(2)])  # it keeps waiting, until it is moved
    assert adapter.execution_device is not None
    np.testing.assert_array_equal(draw(pipe), wanted)
    assert adapter.to("cpu").execution_device is None
    np.testing.assert_array_equal(draw(pipe), wanted)


def test_what_is_read_once_a_prompt_stays_as_stored_and_computes_as_if_it_were_not(
    pipe: StableDiffusionPipeline,
) -> None:
    drawn, sizes = [], []
    for cast in (False, True):
        adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet)).to(dtype=torch.float16)
        if cast:
            adapter.to(dtype=torch.float32)
        adapter.attach(pipe).set_prompt(picture(1))
        drawn.append(draw(pipe))
        sizes.append(sum(weight.nbytes for weight in adapter.state_dict()["ip_adapter"].values()))
        adapter.detach()
    np.testing.assert_array_equal(*drawn)
    assert 2 * sizes[0] == sizes[1]


def test_training_is_as_fine_as_the_projection(pipe: StableDiffusionPipeline) -> None:
    adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet)).to(dtype=torch.float16)
    adapter.attach(pipe.unet).module.requires_grad_(True)
    before = list(adapter.parameters())
    with adapter.training_tokens(torch.randn(1, 4, adapter.projection.cross_dim)):
        pass
    assert {weight.dtype for weight in adapter.parameters()} == {torch.float32}
    assert all(one is other for one, other in zip(adapter.parameters(), before, strict=True))


def test_half_precision_pipelines_draw_with_it(pipe: StableDiffusionPipeline, adapter: IPAdapter) -> None:
    adapter.attach(pipe).set_prompt(picture(1))
    single = draw(pipe)
    pipe.to(torch.bfloat16)
    assert np.abs(draw(pipe) - single).mean() < 0.1
    assert np.isfinite(draw(pipe)).all()


# ---- prompts


def test_every_sample_has_its_own_pictures_and_equals_itself_alone(
    pipe: StableDiffusionPipeline, adapter: IPAdapter
) -> None:
    adapter.attach(pipe)
    samples = [
        picture(1),
        [ImagePrompt(image=[picture(2), picture(3)], scale=0.5), ImagePrompt(image=picture(4), end=0.5)],
        None,
    ]
    adapter.set_batch(samples)
    together = draw(pipe, count=3, each=2)
    for i in range(6):
        adapter.set_batch([samples[i // 2]])
        np.testing.assert_allclose(together[i], draw(pipe, seeds=range(i, i + 1))[0], atol=1e-4)


def test_samples_and_batch_must_agree(pipe: StableDiffusionPipeline, adapter: IPAdapter) -> None:
    adapter.attach(pipe).set_batch([picture(1), picture(2)])
    with pytest.raises(UsageError, match="2 samples, but 3 are drawn"):
        draw(pipe, count=3)
    with pytest.raises(UsageError, match="at least one"):
        adapter.set_batch([])


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (torch.full((1, POOLED), math.nan), InputError, "NaN"),
        (torch.zeros(1, POOLED + 1), EncoderMismatch, f"width {POOLED}.*{POOLED + 1}"),
        (torch.zeros(1, 17, HIDDEN), EncoderMismatch, "pooled"),
        (ImagePrompt(tokens=torch.zeros(4, 31)), AdapterMismatch, "width 32.*31"),
        (ImagePrompt(tokens=torch.full((4, 32), math.inf)), InputError, "NaN or infinite"),
        (ImagePrompt(image=picture(), mask=torch.zeros(4, 4)), InputError, "0 everywhere"),
        (ImagePrompt(image=picture(), profile={"up_blocks": 1.0}), UsageError, "down_blocks.0.attentions.0"),
        (ImagePrompt(image=picture(), profile=[1.0] * 3), UsageError, "takes 4"),
        ("missing.png", ImpromptError, "missing.png"),
    ],
)
def test_a_bad_prompt_is_refused_and_the_one_before_stays(
    pipe: StableDiffusionPipeline,
    adapter: IPAdapter,
    prompt: object,
    error: type[ImpromptError],
    message: str,
) -> None:
    adapter.attach(pipe).set_prompt(picture(1))
    before = draw(pipe)
    with pytest.raises(error, match=message):
        adapter.set_prompt(prompt)
    assert np.array_equal(draw(pipe), before)


def test_a_prompt_set_before_attaching_must_fit_the_unet(
    pipe: StableDiffusionPipeline, adapter: IPAdapter
) -> None:
    adapter.set_prompt(torch.zeros(1, POOLED), profile=[1.0] * 5)
    with pytest.raises(UsageError, match="takes 4"):
        adapter.attach(pipe)
    assert not pipe.unet._forward_pre_hooks
    adapter.set_prompt(torch.ones(1, POOLED), scale=0.5)
    before = draw(pipe)
    adapter.attach(pipe)
    assert not np.array_equal(draw(pipe), before)


def test_pictures_features_and_tokens_are_three_ways_to_say_the_same(
    pipe: StableDiffusionPipeline, adapter: IPAdapter, tmp_path: Path
) -> None:
    adapter.attach(pipe)
    picture(1).save(tmp_path / "cat.png")
    features = adapter.image_encoder.encode([picture(1)])
    ways = [
        picture(1),
        str(tmp_path / "cat.png"),
        features,
        features.pooled,
        ImagePrompt(tokens=adapter.projection(features.pooled)),
    ]
    pictures = []
    for way in ways:
        adapter.set_prompt(way)
        pictures.append(draw(pipe))
    assert all(np.array_equal(pictures[0], other) for other in pictures[1:])


def test_a_negative_picture_replaces_the_variants_own_rule(
    pipe: StableDiffusionPipeline, adapter: IPAdapter
) -> None:
    adapter.attach(pipe)
    drawn = []
    zero = torch.zeros(1, POOLED)
    for negative in (None, zero, picture(2), adapter.image_encoder.encode([picture(2)]).pooled):
        adapter.set_prompt(picture(1), negative=negative)
        drawn.append(draw(pipe))
    assert np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[2], drawn[3])
    assert not np.allclose(drawn[0], drawn[2], atol=1e-3)


def test_bare_hidden_features_need_a_negative_only_with_guidance(pipe: StableDiffusionPipeline) -> None:
    adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet, "plus")).attach(pipe)
    adapter.set_prompt(torch.ones(1, 17, HIDDEN))
    pipe("a cat", num_inference_steps=1, guidance_scale=1.0, width=PICTURE, height=PICTURE)
    with pytest.raises(UsageError, match="negative="):
        draw(pipe)


def test_a_bare_unet_is_told_its_batch(adapter: IPAdapter) -> None:
    unet = tiny_unet("sd")
    adapter.attach(unet).set_prompt(torch.ones(1, POOLED))
    sample, states = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 32)
    with torch.no_grad():
        shown = unet(sample, 500, states).sample
        adapter.batch(guidance=True)
        both = unet(sample.repeat(2, 1, 1, 1), 500, states.repeat(2, 1, 1)).sample
        adapter.batch(guidance=("cond", "uncond"))
        swapped = unet(sample.repeat(2, 1, 1, 1), 500, states.repeat(2, 1, 1)).sample
    torch.testing.assert_close(both[1:], shown)
    torch.testing.assert_close(swapped, both.flip(0))
    with pytest.raises(UsageError, match="a sequence of 'uncond' and 'cond'"):
        adapter.batch(guidance=())


# ---- encoders


def test_the_wrong_encoder_is_refused_before_anything_else(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    save_encoder(tmp_path / "image_encoder", POOLED + 8)
    with pytest.raises(EncoderMismatch, match=rf"width {POOLED}.*image_encoder.*{POOLED + 8}"):
        IPAdapter.from_state_dict(random_adapter_state(pipe.unet), image_encoder=tmp_path / "image_encoder")


def test_a_pipelines_encoder_of_another_width_is_not_used(adapter: IPAdapter) -> None:
    pipe = tiny_sd()
    model, processor = tiny_encoder(POOLED + 8)
    pipe.register_modules(image_encoder=model, feature_extractor=processor)
    adapter.attach(pipe)
    with pytest.raises(EncoderMismatch, match=rf"pooled features of width {POOLED}"):
        adapter.set_prompt(picture(1))
    adapter.set_prompt(torch.ones(1, POOLED))


def test_a_borrowed_encoder_goes_back_with_detach(pipe: StableDiffusionPipeline, adapter: IPAdapter) -> None:
    assert adapter.attach(pipe).image_encoder is not None
    adapter.detach()
    assert adapter.image_encoder is None


# ---- files


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The layout of the published repository: two families' folders, each with its own encoder."""
    unet = tiny_unet("sd")
    for folder, pooled, hidden in (("models", POOLED, HIDDEN), ("sdxl_models", POOLED + 8, HIDDEN + 8)):
        save_encoder(tmp_path / folder / "image_encoder", pooled, hidden)
        state = random_adapter_state(unet, feature_width=pooled)
        IPAdapter.from_state_dict(state).save_pretrained(tmp_path / folder, "ip-adapter.safetensors")
    plus = random_adapter_state(unet, "plus", feature_width=HIDDEN)
    IPAdapter.from_state_dict(plus).save_pretrained(
        tmp_path / "sdxl_models", "ip-adapter-plus_vit-h.safetensors"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("subfolder", "weight_name", "pooled"),
    [
        ("models", None, POOLED),
        ("models", "ip-adapter.safetensors", POOLED),
        ("models", "ip-adapter.bin", POOLED),
        ("sdxl_models", "ip-adapter.safetensors", POOLED + 8),
        # The published trap: an SDXL file that needs the encoder of the other folder.
        ("sdxl_models", "ip-adapter-plus_vit-h.safetensors", POOLED),
    ],
)
def test_a_folder_is_read_and_the_encoder_that_fits_is_found(
    repository: Path, subfolder: str, weight_name: str | None, pooled: int
) -> None:
    adapter = IPAdapter.from_pretrained(repository, subfolder=subfolder, weight_name=weight_name)
    assert adapter.image_encoder.pooled_width == pooled
    pipe = tiny_sd()
    before = draw(pipe)
    adapter.attach(pipe).set_prompt(picture(1))
    assert not np.array_equal(draw(pipe), before)


def test_the_folder_of_a_training_run_is_the_adapter_that_it_made(repository: Path) -> None:
    folder = repository / "models"
    (folder / "checkpoint-00000500.safetensors").write_bytes(b"what the run goes on from")
    assert IPAdapter.from_pretrained(folder).checkpoint.name == "ip-adapter"


def test_a_repository_is_read_from_the_hubs_cache_when_offline(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.mktemp("hub")
    entry = cache / "models--someone--adapters"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("0" * 40)
    (entry / "snapshots").mkdir()
    repository.rename(entry / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    adapter = IPAdapter.from_pretrained("someone/adapters", subfolder="models", weight_name="ip-adapter.bin")
    assert adapter.projection.feature_width == POOLED
    with pytest.raises(ModelError, match=r"hf download someone/adapters models/other.safetensors"):
        IPAdapter.from_pretrained("someone/adapters", subfolder="models", weight_name="other.safetensors")
    with pytest.raises(UsageError, match="weight_name"):
        IPAdapter.from_pretrained("someone/adapters")


def test_files_that_are_not_there_are_said(repository: Path) -> None:
    with pytest.raises(ModelError, match=r"2 \.safetensors files"):
        IPAdapter.from_pretrained(repository, subfolder="sdxl_models")
    with pytest.raises(ModelError, match=r"there is ip-adapter\.safetensors"):
        IPAdapter.from_pretrained(repository, subfolder="models", weight_name="x.safetensors")
    with pytest.raises(ModelError, match=r"there is no adapter at .* a file, a folder or owner/name"):
        IPAdapter.from_pretrained(repository / "nowhere" / "at" / "all")
    with pytest.raises(UsageError, match="is a file"):
        IPAdapter.from_pretrained(repository / "models" / "ip-adapter.safetensors", subfolder="models")
    with pytest.raises(ModelError, match="no image encoder"):
        IPAdapter.from_pretrained(repository, subfolder="models", image_encoder=repository / "sdxl_models")


@pytest.mark.parametrize("kind", ["linear", "plus"])
def test_saved_weights_are_the_ones_loaded_and_diffusers_reads_them(
    pipe: StableDiffusionPipeline, kind: str, tmp_path: Path
) -> None:
    state = random_adapter_state(pipe.unet, kind)
    path = IPAdapter.from_state_dict(state).save_pretrained(tmp_path, "mine.safetensors")
    flat = load_file(path)
    for part, tensors in state.items():
        for name, tensor in tensors.items():
            assert torch.equal(flat[f"{part}.{name}"], tensor)
    assert len(flat) == sum(len(tensors) for tensors in state.values())
    adapter = IPAdapter.from_pretrained(path).attach(pipe)
    adapter.set_prompt(picture(1))
    ours = draw(pipe)
    adapter.detach()
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="mine.safetensors")
    pipe.set_ip_adapter_scale(1.0)
    theirs = pipe(
        "a cat",
        ip_adapter_image=picture(1),
        num_inference_steps=2,
        width=PICTURE,
        height=PICTURE,
        generator=[torch.Generator().manual_seed(0)],
        output_type="np",
    ).images
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_loading_copies_a_state_dict_and_changing_one_leaves_the_other(pipe: StableDiffusionPipeline) -> None:
    state = random_adapter_state(pipe.unet)
    adapter = IPAdapter.from_state_dict(state)
    before = state["ip_adapter"]["1.to_k_ip.weight"].clone()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    assert torch.equal(state["ip_adapter"]["1.to_k_ip.weight"], before)


# ---- training


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_new_adapter_starts_from_the_texts_keys_and_learns(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = tiny_unet("sd")
    width = POOLED if kind == "linear" else HIDDEN
    adapter = IPAdapter.new(unet, kind=kind, feature_width=width, tokens=3)
    for layer in cross_attentions(unet):
        attention = unet.get_submodule(layer.name)
        assert torch.equal(adapter.key_value(layer.index).to_k_ip.weight, attention.to_k.weight)
        assert torch.equal(adapter.key_value(layer.index).to_v_ip.weight, attention.to_v.weight)
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    adapter.attach(unet)
    features = torch.randn((2, width) if kind == "linear" else (2, 17, width))
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    wanted = torch.randn(2, 4, 8, 8)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        with adapter.training_tokens(adapter.projection(features)):
            loss = (unet(sample, torch.tensor([100, 900]), states).sample - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in adapter.parameters())
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    again = IPAdapter.from_pretrained(adapter.save_pretrained(tmp_path))
    assert again.projection.tokens == 3
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, dict(adapter.named_parameters())[name])
        assert not parameter.requires_grad
    # What is drawn afterwards uses the trained weights, not keys and values cached before.
    with torch.no_grad():
        adapter.set_prompt(features[:1])
        again.set_prompt(features[:1])
        mine = unet(sample[:1], 500, states[:1]).sample
        adapter.detach()
        again.attach(unet)
        torch.testing.assert_close(unet(sample[:1], 500, states[:1]).sample, mine)


def test_training_tokens_must_fit(adapter: IPAdapter) -> None:
    unet = tiny_unet("sd")
    adapter.attach(unet)
    with pytest.raises(AdapterMismatch, match="width 32"), adapter.training_tokens(torch.zeros(1, 4, 31)):
        pass
    with (
        pytest.raises(UsageError, match="for 3 rows"),
        adapter.training_tokens(torch.zeros(3, 4, 32)),
    ):
        unet(torch.zeros(2, 4, 8, 8), 5, torch.zeros(2, 5, 32))


def test_a_new_adapter_says_what_it_lacks() -> None:
    with pytest.raises(UsageError, match="feature_width"):
        IPAdapter.new(tiny_unet("sd"))
    with pytest.raises(UsageError, match="multiple of 64"):
        IPAdapter.new(tiny_unet("sd"), kind="resampler", feature_width=HIDDEN, width=96)


def test_the_state_dict_is_the_published_layout(adapter: IPAdapter, pipe: StableDiffusionPipeline) -> None:
    published = random_adapter_state(pipe.unet)
    mine = adapter.state_dict()
    assert {part: set(tensors) for part, tensors in mine.items()} == {
        part: set(tensors) for part, tensors in published.items()
    }


# ---- what users of diffusers are used to


def test_a_dtype_may_stand_first_as_in_torch(adapter: IPAdapter) -> None:
    assert adapter.to(torch.float16).dtype == torch.float16
    assert adapter.to("cpu", torch.float64).dtype == torch.float64


WRONG_KINDS = """
import pytest
import torch

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.errors import UsageError
from tiny import picture, random_adapter_state, tiny_encoder, tiny_unet

unet = tiny_unet()
state = random_adapter_state(unet)
adapter = IPAdapter.from_state_dict(state).attach(unet)
with pytest.raises(UsageError, match=r"image_encoder cannot be a CLIPVisionModel.*repo:subfolder"):
    IPAdapter.from_state_dict(state, image_encoder=tiny_encoder()[0])
with pytest.raises(UsageError, match=r"weight_name cannot be a list.*attach them one after the other"):
    IPAdapter.from_pretrained("owner/name", weight_name=["a.safetensors", "b.safetensors"])
for alone in (picture(1), "a.png", torch.zeros(1, 24)):
    with pytest.raises(UsageError, match=r"set_batch: a list .* set_prompt\\(\\)"):
        adapter.set_batch(alone)
with pytest.raises(UsageError, match=r"guidance: image is '3'"):
    adapter.set_guidance("3")
"""


@pytest.mark.xdist_group("compiled")
def test_what_diffusers_takes_and_this_does_not_is_said(tmp_path: Path, adapter: IPAdapter) -> None:
    run_unchecked(WRONG_KINDS, folder=tmp_path)
    with pytest.raises(EncoderMismatch, match="give a picture as a path or PIL image"):
        adapter.set_prompt(torch.zeros(1, 3, 64, 64))


def test_pictures_and_masks_of_diffusers_own_adapter_are_not_passed_over(
    pipe: StableDiffusionPipeline, adapter: IPAdapter
) -> None:
    adapter.attach(pipe).set_prompt(picture(1))
    steps = {"num_inference_steps": 1, "height": PICTURE, "width": PICTURE}
    with pytest.raises(UsageError, match=r"ip_adapter_image_embeds: .*set_prompt\(ImagePrompt\(features"):
        pipe("a cat", ip_adapter_image_embeds=[torch.zeros(2, 1, POOLED)], **steps)
    masks = {"ip_adapter_masks": [torch.ones(1, 1, PICTURE, PICTURE)]}
    with pytest.raises(UsageError, match=r"ip_adapter_masks: .*mask="):
        pipe("a cat", cross_attention_kwargs=masks, **steps)
    assert draw(pipe).shape == (1, PICTURE, PICTURE, 3)


def test_unloading_diffusers_adapter_leaves_an_attached_one_and_says_how_to_detach_it(
    pipe: StableDiffusionPipeline, adapter: IPAdapter
) -> None:
    bare = draw(pipe)
    adapter.attach(pipe).set_prompt(picture(1))
    shown = draw(pipe)
    with pytest.raises(UsageError, match=r"detach\(\) it first"):
        pipe.unload_ip_adapter()
    assert np.array_equal(draw(pipe), shown)
    adapter.detach()
    assert np.array_equal(draw(pipe), bare)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("kind", ["linear", "plus"])
def test_embeddings_that_diffusers_prepared_are_features(
    kind: str, guidance: bool, pipe: StableDiffusionPipeline
) -> None:
    state = random_adapter_state(pipe.unet, kind)
    pictures = [picture(1), picture(2)]
    pipe.load_ip_adapter(state, subfolder=None, weight_name=None, image_encoder_folder=None)
    (embeds,) = pipe.prepare_ip_adapter_image_embeds([pictures], None, "cpu", 1, guidance)
    pipe.unload_ip_adapter()
    model, processor = tiny_encoder()
    pipe.register_modules(image_encoder=model, feature_extractor=processor)  # diffusers has removed them
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    with pytest.raises(EncoderMismatch, match=r"give embeds\.chunk\(2\)\[-1\]\[0\]"):
        adapter.set_prompt(embeds)
    adapter.set_prompt(embeds.chunk(2)[-1][0])
    (prepared,) = adapter.samples[0]
    adapter.set_prompt(pictures)
    (shown,) = adapter.samples[0]
    torch.testing.assert_close(prepared.tokens, shown.tokens, atol=1e-5, rtol=1e-4)
