"""Framings by the pixels they keep, tiles by what they cover, merging and noise by their formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tinydit
from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.framing import MEAN_COLOUR, encode, frame, merge_hidden, noisy, sharpened, tiles
from imprompt.errors import InputError, UsageError
from imprompt.schema.options import FRAMINGS, NOISES
from tiny import picture, tiny_encoder


def ramp(width: int, height: int) -> Image.Image:
    """Red says the column, green the row."""
    down, across = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))


@pytest.mark.parametrize(
    ("framing", "size", "first"),
    [
        ("crop", (60, 20), (20, 0)),
        ("left", (60, 20), (0, 0)),
        ("right", (60, 20), (40, 0)),
        ("top", (20, 60), (0, 0)),
        ("bottom", (20, 60), (0, 40)),
        ("top", (60, 20), (20, 0)),
    ],
)
def test_a_crop_keeps_the_named_end(framing: str, size: tuple[int, int], first: tuple[int, int]) -> None:
    cut = frame(ramp(*size), framing, 16)
    assert cut.size == (20, 20)
    assert cut.getpixel((0, 0))[:2] == first


def test_a_letterbox_keeps_everything_on_the_mean_colour() -> None:
    image = ramp(60, 20)
    square = frame(image, "pad", 16)
    assert square.size == (60, 60)
    assert np.array_equal(np.asarray(square)[20:40], np.asarray(image))
    assert square.getpixel((5, 5)) == MEAN_COLOUR


def test_squash_fills_the_encoder_and_ignores_proportions() -> None:
    assert frame(ramp(60, 20), "squash", 16).size == (16, 16)


@settings(max_examples=50, deadline=None)
@given(st.integers(8, 120), st.integers(8, 120))
def test_tiles_are_squares_that_cover_every_pixel(width: int, height: int) -> None:
    image = ramp(width, height)
    try:
        cuts, rows, columns = tiles(image, 32)
    except InputError:
        assert max(width, height) > 3 * min(width, height)
        return
    assert len(cuts) == rows * columns <= 16
    assert len({cut.size for cut in cuts}) == 1
    assert cuts[0].width == cuts[0].height
    seen = {pixel for cut in cuts for pixel in np.asarray(cut).reshape(-1, 3).view("V3").ravel().tolist()}
    assert len(seen) == width * height


def test_a_small_square_is_one_tile_and_a_ribbon_is_refused() -> None:
    assert tiles(ramp(20, 20), 32)[1:] == (1, 1)
    with pytest.raises(InputError, match="400×10 needs 40 tiles"):
        tiles(Image.new("RGB", (400, 10)), 32)


def test_tiles_of_equal_patches_merge_to_themselves_and_others_to_area_means() -> None:
    same = torch.randn(1, 17, 5)
    torch.testing.assert_close(merge_hidden(torch.ones(4, 17, 5), 2, 2), torch.ones(17, 5))
    torch.testing.assert_close(merge_hidden(same, 1, 1), same[0])
    hidden = torch.randn(4, 17, 3)
    merged = merge_hidden(hidden, 2, 2)
    torch.testing.assert_close(merged[0], hidden[:, 0].mean(0))
    # The first output patch is the mean of the first tile's upper left 2×2 patches.
    torch.testing.assert_close(merged[1], hidden[0, [1, 2, 5, 6]].mean(0))
    # The last is that of the last tile's lower right.
    torch.testing.assert_close(merged[16], hidden[3, [11, 12, 15, 16]].mean(0))


def test_tiles_of_siglip_have_no_class_token() -> None:
    hidden = torch.randn(4, 16, 3)
    merged = merge_hidden(hidden, 2, 2)
    torch.testing.assert_close(merged[0], hidden[0, [0, 1, 4, 5]].mean(0))
    siglip = ImageEncoder(tinydit.siglip(), tinydit.siglip_processor())
    found = encode(siglip, [picture(1, (96, 32)), picture(2, (40, 40))], "tile")
    plain = siglip.encode([picture(1, (96, 32)), picture(2, (40, 40))])
    assert found.last is not None
    assert plain.last is not None
    for tiled, whole in ((found.hidden, plain.hidden), (found.last, plain.last)):
        assert not torch.allclose(tiled[0], whole[0], atol=1e-3)
        torch.testing.assert_close(tiled[1], whole[1])


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return ImageEncoder(*tiny_encoder())


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_square_picture_is_the_same_in_every_framing(encoder: ImageEncoder, framing: str) -> None:
    shown = [picture(1, (40, 40))]
    assert torch.equal(encode(encoder, shown, framing).hidden, encoder.encode(shown).hidden)


def test_what_is_cut_off_matters_only_where_it_is_seen(encoder: ImageEncoder) -> None:
    one = picture(1, (96, 32))
    other = one.copy()
    other.paste((0, 0, 255), (0, 0, 20, 32))  # the left end
    for framing in FRAMINGS:
        same = torch.equal(encode(encoder, [one], framing).pooled, encode(encoder, [other], framing).pooled)
        assert same == (framing in ("crop", "top", "bottom", "right")), framing


def test_tiles_share_with_the_whole_by_detail(encoder: ImageEncoder) -> None:
    wide = picture(2, (96, 32))
    whole, parts = encode(encoder, [wide], "tile", detail=0.0), encode(encoder, [wide], "tile", detail=1.0)
    assert torch.equal(whole.pooled, encode(encoder, [wide], "squash").pooled)
    cuts, _, _ = tiles(wide, 32)
    torch.testing.assert_close(parts.pooled[0], encoder.encode(cuts).pooled.mean(0))


def test_an_unknown_framing_lists_them(encoder: ImageEncoder) -> None:
    with pytest.raises(UsageError, match="did you mean 'squash'"):
        encode(encoder, [picture()], "squach")


@pytest.mark.parametrize("kind", NOISES)
def test_noise_is_the_same_for_a_seed_and_touches_no_global_state(kind: str) -> None:
    image, before = picture(3), torch.get_rng_state()
    assert noisy(image, kind, 0.5, 1).tobytes() == noisy(image, kind, 0.5, 1).tobytes()
    assert noisy(image, kind, 0.5, 1).tobytes() != noisy(image, kind, 0.5, 2).tobytes()
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_follows_its_formula() -> None:
    image = picture(3)
    x = np.asarray(image) / 255
    for kind in ("fade", "dissolve", "gaussian"):
        assert noisy(image, kind, 0.0).tobytes() == image.tobytes()
    uniform = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(4)).numpy()
    np.testing.assert_allclose(
        np.asarray(noisy(image, "fade", 0.3, 4)) / 255, 0.7 * x + 0.3 * uniform, atol=3e-3
    )
    changed = (np.asarray(noisy(image, "dissolve", 0.25)) != np.asarray(image)).any(-1).mean()
    assert changed == pytest.approx(0.25, abs=0.05)
    shuffled = np.asarray(noisy(image, "shuffle", 0.0)) / 255
    assert 0.02 < np.abs(shuffled - x[::-1, ::-1]).mean() < 0.35


def test_a_strength_beyond_one_is_refused() -> None:
    with pytest.raises(InputError, match="from 0 to 1"):
        noisy(picture(), "fade", 1.5)


# ---- sharpening


def test_sharpening_is_its_published_formula() -> None:
    image = picture(3)
    x = np.asarray(image, np.float64) / 255
    amount = 0.7
    wide = np.pad(x, ((1, 1), (1, 1), (0, 0)), mode="edge")
    expected = np.empty_like(x)
    for row in range(x.shape[0]):
        for column in range(x.shape[1]):
            e = wide[row + 1, column + 1]
            beside = [
                wide[row, column + 1],
                wide[row + 2, column + 1],
                wide[row + 1, column],
                wide[row + 1, column + 2],
            ]
            least, most = np.min([e, *beside], 0), np.max([e, *beside], 0)
            w = -amount / 5 * np.sqrt(np.clip(np.minimum(least, 1 - most) / np.maximum(most, 1e-6), 0, 1))
            expected[row, column] = (e + w * sum(beside)) / (1 + 4 * w)
    seen = np.asarray(sharpened(image, amount, image.width), np.float64) / 255
    np.testing.assert_allclose(seen, np.clip(expected, 0, 1), atol=0.51 / 255)


def test_sharpening_leaves_flat_surfaces_and_nothing_is_the_default(encoder: ImageEncoder) -> None:
    flat = Image.new("RGB", (32, 32), (10, 128, 250))
    assert sharpened(flat, 1.0, 32).tobytes() == flat.tobytes()
    assert sharpened(picture(1), 0.0, 32).tobytes() == picture(1).tobytes()
    pictures = [picture(1, (60, 40))]
    plain, sharp = encode(encoder, pictures), encode(encoder, pictures, sharpen=0.8)
    assert torch.equal(encode(encoder, pictures, sharpen=0.0).pooled, plain.pooled)
    assert not torch.allclose(sharp.pooled, plain.pooled)
    with pytest.raises(InputError, match=r"sharpen: 1.5"):
        encode(encoder, pictures, sharpen=1.5)
