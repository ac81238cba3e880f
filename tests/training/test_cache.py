"""The cache: made once, found again, made anew when anything it depends on changes or is damaged."""

import pytest
import torch

import tiny
from imprompt.data.rows import read_dataset
from imprompt.encoders.clip import ImageEncoder
from imprompt.errors import ModelError
from imprompt.training import cache
from imprompt.training.cache import encode_features, encode_latents, fingerprint

CPU = torch.device("cpu")


@pytest.fixture
def rows(pictures):
    return read_dataset(pictures).rows


@pytest.fixture
def vae():
    return tiny.tiny_sd().vae


def test_latents_are_the_vaes_own(rows, vae, make_config):
    table = encode_latents(rows, vae, make_config(), (32, 32), CPU)
    from PIL import Image

    crop = Image.open(rows[2].file).crop((4, 0, 36, 32))
    pixels = torch.tensor(list(crop.tobytes()), dtype=torch.float32).view(1, 32, 32, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = vae.encode(pixels / 127.5 - 1).latent_dist
    scale = vae.config.scaling_factor
    assert torch.allclose(table.rows("mean", [2])[0], expected.mean[0] * scale, atol=2e-3)
    assert torch.allclose(table.rows("std", [2])[0], expected.std[0] * scale, atol=2e-3)


def test_nothing_is_encoded_twice(rows, vae, make_config, monkeypatch):
    encode_latents(rows, vae, make_config(), (32, 32), CPU)
    monkeypatch.setattr(type(vae), "encode", lambda *_: pytest.fail("encoded again"))
    table = encode_latents(rows, vae, make_config(), (32, 32), CPU)
    assert table.rows("mean", [0]).shape == (1, 4, 16, 16)


def test_another_picture_another_encoder_or_another_size_is_encoded_anew(rows, vae, make_config):
    def files():
        return {path.name for path in make_config().cache_folder.iterdir()}

    encode_latents(rows, vae, make_config(), (32, 32), CPU)
    first = files()
    encode_latents(rows, vae, make_config(), (16, 16), CPU)
    second = files()
    with torch.no_grad():
        next(vae.parameters()).add_(0.1)
    encode_latents(rows, vae, make_config(), (32, 32), CPU)
    third = files()
    tiny.picture(50, (40, 32)).save(rows[0].file)
    encode_latents(rows, vae, make_config(), (32, 32), CPU)
    assert len(first) < len(second) < len(third) < len(files())


def test_a_damaged_shard_is_made_anew(rows, vae, make_config):
    before = encode_latents(rows, vae, make_config(), (32, 32), CPU).rows("mean", range(7))
    (shard,) = make_config().cache_folder.iterdir()
    shard.write_bytes(shard.read_bytes()[:50])
    assert torch.equal(encode_latents(rows, vae, make_config(), (32, 32), CPU).rows("mean", range(7)), before)


def test_a_broken_picture_is_reported_and_stops_nothing(rows, vae, make_config):
    rows[1].file.write_bytes(rows[1].file.read_bytes()[:90])
    rows[3].file.unlink()
    for _ in range(2):  # from the encoder, then from disk
        table = encode_latents(rows, vae, make_config(), (32, 32), CPU)
        assert set(table.rejected) == {1, 3}
        assert table.rows("mean", [0, 2]).isfinite().all()


def test_a_table_reads_the_same_from_disk_as_from_memory(rows, make_config, monkeypatch):
    encoder = ImageEncoder(*tiny.tiny_encoder())
    config = make_config(views=3)
    table, _ = encode_features(rows, encoder, "hidden", config, (32, 32))
    monkeypatch.setattr(cache, "IN_MEMORY", 0)
    lazy, _ = encode_features(rows, encoder, "hidden", config, (32, 32))
    assert lazy._loaded is None
    assert torch.equal(lazy.rows("hidden", [4, 1], [2, 0]), table.rows("hidden", [4, 1], [2, 0]))


def test_several_shards_keep_the_rows_order(rows, vae, make_config, monkeypatch):
    whole = encode_latents(rows, vae, make_config(), (32, 32), CPU).rows("mean", range(7))
    monkeypatch.setattr(cache, "SHARD", 3)
    split = encode_latents(rows, vae, make_config(), (32, 32), CPU)
    assert torch.allclose(split.rows("mean", range(7)), whole, atol=1e-3)


def test_versions_of_a_reference_differ_and_the_first_is_the_picture(rows, make_config):
    encoder = ImageEncoder(*tiny.tiny_encoder())
    plain, _ = encode_features(rows, encoder, "pooled", make_config(), (32, 32))
    varied, negative = encode_features(rows, encoder, "pooled", make_config(views=3), (32, 32))
    assert torch.allclose(varied.rows("pooled", [2], [0]), plain.rows("pooled", [2], [0]), atol=1e-3)
    assert not torch.allclose(varied.rows("pooled", [2], [1]), varied.rows("pooled", [2], [2]), atol=1e-3)
    assert torch.equal(negative, torch.zeros(1, tiny.POOLED))


def test_an_encoder_that_gives_nan_is_an_error(rows, vae, make_config):
    with torch.no_grad():
        next(vae.parameters()).fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        encode_latents(rows, vae, make_config(), (32, 32), CPU)


def test_a_fingerprint_sees_every_weight():
    first, second = tiny.tiny_sd().vae, tiny.tiny_sd().vae
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        list(second.parameters())[-1].view(-1)[0] += 1e-3
    assert fingerprint(first) != fingerprint(second)
