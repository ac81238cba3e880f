"""Texts with a place: their formula, exactness outside, overlap, batches, words and embeddings."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.adapter.masks import feathered, read_mask, resize_mask
from imprompt.adapter.regions import TextRegions
from imprompt.encoders.clip import ImageEncoder
from imprompt.errors import AdapterMismatch, InputError, UsageError
from imprompt.schema.prompt import ImagePrompt, TextRegion
from tiny import TEXT_WIDTH, picture, random_adapter_state, tiny_encoder, tiny_sd, tiny_sdxl, tiny_unet

LEFT = torch.zeros(16, 16)
LEFT[:, :8] = 1
RIGHT = 1 - LEFT


def words(seed: int, tokens: int = 5) -> Tensor:
    return torch.randn(tokens, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def first_layer(unet: UNet2DConditionModel, text: Tensor, rows: int = 1, size: int = 8) -> Tensor:
    """What the first cross-attention gives, as (rows, height, width, channels)."""
    seen = []
    layer = unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2")
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        sample = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(1))
        unet(sample.expand(rows, -1, -1, -1), 500.0, text.expand(rows, -1, -1))
    finally:
        hook.remove()
    return seen[0].unflatten(1, (size, size))


def test_each_place_reads_its_texts_in_the_masks_shares(
    unet: UNet2DConditionModel, adapter: IPAdapter
) -> None:
    """out = Σ share · attention(text): the layer's output projection is linear, and shares add up to 1."""
    adapter.clear_prompt()
    prompt, one, other = (first_layer(unet, words(seed)) for seed in (1, 2, 3))
    columns = torch.linspace(0, 1, 8)[None, :].expand(8, 8)
    adapter.set_prompt(
        [
            ImagePrompt(image=picture(1), scale=0.0, mask=columns, text=words(2)),
            ImagePrompt(image=picture(2), scale=0.0, mask=(columns * 0.5), text=words(3)),
        ]
    )
    first, second = columns[None, ..., None], 0.5 * columns[None, ..., None]
    total = (first + second).clamp_min(1)
    expected = prompt * (1 - first - second).clamp_min(0) + one * first / total + other * second / total
    torch.testing.assert_close(first_layer(unet, words(1)), expected, rtol=1e-4, atol=1e-5)


def test_outside_its_mask_a_text_is_not_read_bit_for_bit(
    unet: UNet2DConditionModel, adapter: IPAdapter
) -> None:
    adapter.clear_prompt()
    plain = first_layer(unet, words(1))
    adapter.set_prompt(picture(1), mask=LEFT, text=words(2))
    seen = first_layer(unet, words(1))
    assert torch.equal(seen[:, :, 4:], plain[:, :, 4:])
    assert not torch.isclose(seen[:, :, :4], plain[:, :, :4]).all()


@pytest.mark.parametrize("size", [8, 12, 9])
def test_complementary_regions_are_each_alone_on_their_side(
    unet: UNet2DConditionModel, adapter: IPAdapter, size: int
) -> None:
    one = ImagePrompt(image=picture(1), mask=LEFT, text=words(2))
    other = ImagePrompt(image=picture(2), mask=1 - LEFT, text=words(3))
    sides = []
    for prompts in ([one], [other], [one, other]):
        adapter.set_prompt(prompts)
        sides.append(first_layer(unet, words(1), size=size))
    half = size // 2
    assert torch.equal(sides[2][:, :, :half], sides[0][:, :, :half])
    assert torch.equal(sides[2][:, :, -half:], sides[1][:, :, -half:])


def test_samples_of_a_batch_have_texts_of_their_own_and_of_any_length(
    unet: UNet2DConditionModel, adapter: IPAdapter
) -> None:
    samples = [
        ImagePrompt(image=picture(1), mask=LEFT, text=words(2)),
        ImagePrompt(image=picture(2), scale=0.5),
        ImagePrompt(image=picture(3), mask=1 - LEFT, feather=0.3, text=words(4, tokens=2)),
        None,
    ]
    adapter.set_batch(samples)
    together = first_layer(unet, words(1), rows=4)
    for i, sample in enumerate(samples):
        adapter.clear_prompt() if sample is None else adapter.set_prompt(sample)
        torch.testing.assert_close(together[i], first_layer(unet, words(1))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_words_are_encoded_as_the_pipelines_own_prompt(family: str) -> None:
    pipe = tiny_sd() if family == "sd" else tiny_sdxl()
    encoder = ImageEncoder(*tiny_encoder(), name="tiny")
    adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet), image_encoder=encoder).attach(pipe)

    def draw(prompt: str) -> Tensor:
        call = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt"}
        return pipe(prompt, generator=torch.Generator().manual_seed(0), **call).images

    adapter.set_prompt(picture(1), scale=0.0, mask=LEFT, text="a dog")
    said = draw("a cat")
    embeddings = pipe.encode_prompt(
        "a dog", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    adapter.set_prompt(picture(1), scale=0.0, mask=LEFT, text=embeddings[0])
    assert torch.equal(draw("a cat"), said)
    adapter.clear_prompt()
    plain = draw("a cat")
    assert not torch.allclose(said, plain)
    if family == "sd":  # SDXL has a pooled text besides, which has no place
        everywhere = torch.ones(4, 4)
        adapter.set_prompt(picture(1), scale=0.0, mask=everywhere, text="a dog")
        torch.testing.assert_close(
            draw("a cat"), adapter.clear_prompt() or draw("a dog"), rtol=1e-4, atol=1e-4
        )
    adapter.set_prompt(picture(1), scale=0.0, mask=LEFT, text="a cat")  # what is said anyway changes nothing
    torch.testing.assert_close(draw("a cat"), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": words(1)}, "text: has no effect without a mask"),
        ({"feather": 0.1}, "feather: has no effect without a mask"),
        ({"mask": LEFT, "feather": 2.0}, "feather: .*less than or equal to 1"),
        ({"mask": LEFT, "feather": float("nan")}, "a finite number"),
        ({"mask": LEFT, "text": "a dog"}, "attach the adapter to one before"),
        ({"mask": LEFT, "text": torch.zeros(3, 7)}, r"shape \(3, 7\)"),
        ({"mask": LEFT, "text": torch.full((3, TEXT_WIDTH), float("nan"))}, "finite embeddings"),
    ],
)
def test_a_region_without_sense_is_refused_and_nothing_changes(
    adapter: IPAdapter, fields: dict[str, object], said: str
) -> None:
    before = adapter.samples
    with pytest.raises((UsageError, InputError), match=said):
        adapter.set_prompt(picture(1), **fields)  # type: ignore[arg-type]
    assert adapter.samples is before


# ---- texts without a picture


@pytest.fixture
def texts(unet: UNet2DConditionModel, adapter: IPAdapter):
    adapter.clear_prompt()
    made = TextRegions().attach(unet)
    yield made
    made.detach()


@pytest.mark.parametrize("size", [8, 12])
def test_inside_its_mask_each_text_is_the_prompt_and_outside_none_is_read(
    unet: UNet2DConditionModel, texts: TextRegions, size: int
) -> None:
    prompt, one, other = (first_layer(unet, words(seed), size=size) for seed in (1, 2, 3))
    half = size // 2
    texts.set([TextRegion(words(2), LEFT)])
    seen = first_layer(unet, words(1), size=size)
    torch.testing.assert_close(seen[:, :, :half], one[:, :, :half], rtol=1e-5, atol=1e-6)
    assert torch.equal(seen[:, :, half:], prompt[:, :, half:])
    texts.set([TextRegion(words(2), LEFT), TextRegion(words(3), RIGHT)])
    seen = first_layer(unet, words(1), size=size)
    torch.testing.assert_close(seen[:, :, :half], one[:, :, :half], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen[:, :, half:], other[:, :, half:], rtol=1e-5, atol=1e-6)
    texts.set([])
    assert torch.equal(first_layer(unet, words(1), size=size), prompt)


def test_image_prompts_add_beside_texts_what_they_add_without(
    unet: UNet2DConditionModel, texts: TextRegions, adapter: IPAdapter
) -> None:
    shown = [
        ImagePrompt(image=picture(1), mask=LEFT.T, scale=0.7),
        ImagePrompt(image=picture(2), mask=RIGHT, text=words(4)),
    ]
    regions = [TextRegion(words(2), LEFT)]
    plain = first_layer(unet, words(1))
    texts.set(regions)
    alone = first_layer(unet, words(1))
    adapter.set_prompt(shown)
    both = first_layer(unet, words(1))
    texts.set([])
    pictures = first_layer(unet, words(1))
    torch.testing.assert_close(both - pictures, alone - plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(both[:, :, 4:], pictures[:, :, 4:])
    assert not torch.isclose(both[:, :, :4], pictures[:, :, :4]).all()


def test_samples_of_a_batch_have_regions_of_their_own(unet: UNet2DConditionModel, texts: TextRegions) -> None:
    samples = [
        [TextRegion(words(2), LEFT), TextRegion(words(3, tokens=2), LEFT.T, feather=0.3)],
        [],
        [TextRegion(words(4), RIGHT)],
    ]
    texts.set_batch(samples)
    together = first_layer(unet, words(1), rows=3)
    for i, regions in enumerate(samples):
        texts.set(regions)
        torch.testing.assert_close(together[i], first_layer(unet, words(1))[0], rtol=1e-4, atol=1e-5)


def test_the_negative_half_reads_its_own_text_alone() -> None:
    pipe = tiny_sd()
    texts = TextRegions().attach(pipe)
    texts.set([TextRegion("a dog", torch.ones(4, 4))])
    halves: dict[str, list[Tensor]] = {}
    for name in ("region", "plain"):
        layer = pipe.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2")
        seen = halves.setdefault(name, [])
        hook = layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        pipe("a cat", num_inference_steps=1, guidance_scale=4.0, generator=torch.Generator().manual_seed(0))
        hook.remove()
        texts.set([])
    (region, _), (plain, _) = (halves[name][0].chunk(2) for name in ("region", "plain"))
    assert torch.equal(region, plain)
    assert not torch.allclose(halves["region"][0], halves["plain"][0])


def test_a_text_everywhere_draws_what_it_draws_as_the_prompt() -> None:
    pipe = tiny_sd()
    before = dict(pipe.unet.attn_processors)

    def draw(prompt: str) -> Tensor:
        call = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt"}
        return pipe(prompt, generator=torch.Generator().manual_seed(0), **call).images

    expected, cat = draw("a dog"), draw("a cat")
    texts = TextRegions().attach(pipe)
    texts.set([TextRegion("a dog", torch.ones(4, 4))])
    torch.testing.assert_close(draw("a cat"), expected, rtol=1e-4, atol=1e-4)
    texts.detach()
    assert torch.equal(draw("a cat"), cat)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())


def test_regions_without_sense_are_refused_and_nothing_changes(
    unet: UNet2DConditionModel, texts: TextRegions
) -> None:
    texts.set([TextRegion(words(2), LEFT)])
    before = texts.samples
    for make, error, said in (
        (lambda: TextRegion(" ", LEFT), UsageError, "text is empty"),
        (lambda: TextRegion("a", LEFT, feather=2.0), UsageError, "feather: .*less than or equal to 1"),
        (lambda: texts.set([TextRegion("a dog", LEFT)]), UsageError, "encoded by the pipeline"),
        (lambda: texts.set([TextRegion(words(2)[:, :3], LEFT)]), InputError, r"shape \(5, 3\)"),
        (lambda: texts.set([TextRegion(words(2), torch.zeros(4, 4))]), InputError, "0 everywhere"),
        (lambda: texts.set([TextRegion(words(2), torch.full((4, 4), 2.0))]), InputError, "outside 0 to 1"),
        (lambda: texts.attach(tiny_unet("sd")), UsageError, "attached to another UNet"),
        (lambda: TextRegions().attach(object()), AdapterMismatch, "object has none"),
        (lambda: TextRegions().set([]), UsageError, r"attach\(\) the regions"),
    ):
        with pytest.raises(error, match=said):
            make()
    assert texts.samples is before


# ---- feathering


@given(st.floats(0.01, 1.0), st.integers(4, 40), st.integers(4, 40))
@settings(max_examples=25, deadline=None)
def test_feathered_masks_stay_complementary_and_between_0_and_1(
    width: float, rows: int, columns: int
) -> None:
    mask = (torch.rand(1, 1, rows, columns, generator=torch.Generator().manual_seed(rows)) > 0.5).float()
    soft, other = feathered(mask, width), feathered(1 - mask, width)
    assert 0 <= soft.min() <= soft.max() <= 1
    torch.testing.assert_close(soft + other, torch.ones_like(soft), rtol=0, atol=1e-4)


def test_an_edge_becomes_a_straight_ramp_of_the_width_said() -> None:
    mask = torch.zeros(400, 600)
    mask[:, 300:] = 1
    soft = read_mask(mask, 0.25)[0, 0, 200]
    assert not soft[:249].any()
    assert (soft[351:] > 0.9999).all()
    torch.testing.assert_close(soft[[275, 300, 325]], torch.tensor([0.25, 0.5, 0.75]), rtol=0, atol=0.01)
    assert torch.equal(read_mask(torch.ones(3, 5), 0.5), torch.ones(1, 1, 258, 430))  # a border is no edge


# ---- masks beside diffusers' processing of them


def their_grid(mask: Tensor, size: tuple[int, int]) -> Tensor:
    from diffusers.image_processor import IPAdapterMaskProcessor

    flat = IPAdapterMaskProcessor.downsample(mask[None], 1, size[0] * size[1], 1)
    return flat[0, :, 0].reshape(size)


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (16, 16), (8, 8), (64, 96), (8, 12)])
def test_masks_along_the_grid_are_as_diffusers_makes_them(size: tuple[int, int]) -> None:
    mask = torch.zeros(256, size[1] * 256 // size[0])
    mask[:, : mask.shape[1] // 2] = 1
    assert torch.equal(resize_mask(mask[None, None], size)[0, 0], their_grid(mask, size))


def test_masks_across_the_grid_keep_their_area_which_diffusers_does_not() -> None:
    """The reason for ours: area averages say how much of a place is covered and stay within 0 to 1.
    Diffusers samples bicubically without antialiasing, so edges jump, and values beside them leave it."""
    mask = torch.zeros(48, 48)
    mask[:, :17] = 1
    ours, theirs = resize_mask(mask[None, None], (16, 16))[0, 0], their_grid(mask, (16, 16))
    assert ours[0, 5] == pytest.approx(2 / 3)
    assert float(ours.mean()) == pytest.approx(float(mask.mean()))
    assert float(theirs.mean()) != pytest.approx(float(mask.mean()), abs=1e-3)
    double = torch.zeros(32, 32)
    double[:, :16] = 1
    assert their_grid(double, (16, 16)).min() < 0
    assert resize_mask(double[None, None], (16, 16)).unique().tolist() == [0, 1]


def test_sizes_that_diffusers_pads_or_cuts_at_the_tail_keep_their_place() -> None:
    """At 72×40 latents, twice halved, diffusers computes another grid than the UNet has for a square mask."""
    mask = torch.zeros(1, 1, 100, 100)
    mask[..., 50:, :] = 1
    grid = resize_mask(mask, (18, 10))[0, 0]
    assert not grid[:9].any()
    assert (grid[9:] == 1).all()


# ---- everything at once, in one batch


def test_samples_with_masks_windows_curves_scales_and_texts_equal_themselves_alone() -> None:
    """Through a whole guided pipeline, two pictures each: within 1e-4 of the sample drawn alone (float32; the
    order of sums differs with the batch)."""
    pipe = tiny_sd()
    encoder = ImageEncoder(*tiny_encoder(), name="tiny")
    adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet), image_encoder=encoder).attach(pipe)
    samples = [
        [
            ImagePrompt(image=picture(1), mask=LEFT, feather=0.2, text="a dog", scale=0.7),
            ImagePrompt(image=picture(2), mask=1 - LEFT, start=0.3, scaling="k+v"),
        ],
        ImagePrompt(image=[picture(3), picture(4)], weights=[2.0, 1.0], curve="fade-out", end=0.8),
        None,
        ImagePrompt(image=picture(5), mask=LEFT.T, text="the sea", profile=(1.0, 0.2, 0.0, 0.5), sharpen=0.5),
    ]

    def draw(seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "pt"}
        each = 2 if len(seeds) > 1 else 1
        return pipe(
            ["a cat"] * (len(seeds) // each), num_images_per_prompt=each, generator=generators, **call
        ).images

    adapter.set_guidance(6.0)
    adapter.set_batch(samples)
    together = draw(list(range(8)))
    for i in range(8):
        adapter.set_batch([samples[i // 2]])
        torch.testing.assert_close(together[i], draw([i])[0], rtol=0, atol=1e-4)


def test_a_mask_finer_on_one_side_and_coarser_on_the_other_is_averaged_there() -> None:
    stripes = torch.zeros(64, 4)
    stripes[::4] = 1
    assert torch.equal(resize_mask(stripes[None, None], (16, 16)), torch.full((1, 1, 16, 16), 0.25))
    assert torch.equal(resize_mask(stripes.T[None, None], (16, 16)), torch.full((1, 1, 16, 16), 0.25))
