"""The cache: made once, found again, made anew when anything it depends on changes or is damaged."""

import os
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open

import tiny
from facemodels import pack
from imprompt.data.read import read_dataset
from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.face_onnx import OnnxFaces
from imprompt.errors import ModelError
from imprompt.training import cache, tables
from imprompt.training.cache import ClipFeatures, clean, encode_features, encode_latents, fingerprint
from imprompt.training.faces import FaceFeatures
from imprompt.training.pictures import Pictures
from imprompt.training.tables import Ranks

CPU = torch.device("cpu")


@pytest.fixture
def rows(pictures):
    return read_dataset(pictures).rows


def of(rows, side=32):
    return Pictures.read(rows, lambda content: (side, side))


@pytest.fixture
def vae():
    return tiny.tiny_sd().vae


def shards(config):
    return sorted(config.cache_folder.rglob("*.safetensors"))


def test_latents_are_the_vaes_own(rows, vae, make_config):
    table = encode_latents(of(rows), vae, make_config(), CPU)
    crop = Image.open(rows[2].file).crop((4, 0, 36, 32))
    pixels = torch.tensor(list(crop.tobytes()), dtype=torch.float32).view(1, 32, 32, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = vae.encode(pixels / 127.5 - 1).latent_dist
    scale = vae.config.scaling_factor
    assert torch.allclose(table.rows("mean", [2], [0])[0], expected.mean[0] * scale, atol=2e-3)
    assert torch.allclose(table.rows("std", [2], [0])[0], expected.std[0] * scale, atol=2e-3)
    # SDXL's conditions: original height and width, top and left of the crop, height and width of the target
    assert table.rows("crop", [2]).tolist() == [[32, 40, 0, 4, 32, 32]]


def test_a_mirrored_target_is_the_mirrored_picture(rows, vae, make_config):
    table = encode_latents(of(rows), vae, make_config(flip=0.5), CPU)
    ImageOps.mirror(Image.open(rows[2].file)).save(rows[2].file)
    turned = encode_latents(of(rows), vae, make_config(), CPU)
    assert torch.allclose(table.rows("mean", [2], [1]), turned.rows("mean", [2], [0]), atol=2e-3)
    assert not torch.allclose(table.rows("mean", [2], [0]), turned.rows("mean", [2], [0]), atol=2e-2)


def test_a_reference_is_mirrored_with_its_target(rows, make_config):
    """Each version is there as it is and mirrored; a cache of runs without mirroring is another."""
    encoder = ClipFeatures(ImageEncoder(*tiny.tiny_encoder()), "pooled")
    both = encode_features(of(rows), encoder, make_config(flip=0.5, views=2))
    plain = encode_features(of(rows), encoder, make_config(views=2))
    ImageOps.mirror(Image.open(rows[2].file)).save(rows[2].file)
    turned = encode_features(of(rows), encoder, make_config())
    assert torch.allclose(both.rows("pooled", [2], [2]), turned.rows("pooled", [2], [0]), atol=2e-3)
    assert torch.equal(both.rows("pooled", [3, 3], [0, 1]), plain.rows("pooled", [3, 3], [0, 1]))
    assert not torch.allclose(both.rows("pooled", [3], [1]), both.rows("pooled", [3], [3]), atol=1e-3)


def test_one_new_picture_is_encoded_alone(rows, vae, make_config):
    config = make_config()
    before = encode_latents(of(rows), vae, config, CPU).rows("mean", range(7), [0] * 7)
    old = shards(config)
    tiny.picture(50, (40, 32)).save(rows[3].file)
    after = encode_latents(of(rows), vae, config, CPU).rows("mean", range(7), [0] * 7)
    (new,) = set(shards(config)) - set(old)
    with safe_open(new, "pt") as file:
        assert len(list(file.keys())) == 3  # mean, std and crop of one picture
    same = [bool(torch.equal(a, b)) for a, b in zip(before, after, strict=True)]
    assert same == [True, True, True, False, True, True, True]


def test_another_encoder_or_another_size_is_encoded_anew(rows, vae, make_config):
    config = make_config()
    encode_latents(of(rows), vae, config, CPU)
    first = set(shards(config))
    encode_latents(of(rows, 16), vae, config, CPU)
    second = set(shards(config))
    with torch.no_grad():
        next(vae.parameters()).add_(0.1)
    encode_latents(of(rows), vae, config, CPU)
    assert len(first) < len(second) < len(shards(config))
    untouched = {path.stat().st_mtime_ns for path in shards(config)}
    encode_latents(of(rows), vae, config, CPU)
    assert {path.stat().st_mtime_ns for path in shards(config)} == untouched


@pytest.mark.parametrize("damage", [lambda b: b[:50], lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]])
def test_a_damaged_shard_is_noticed_by_one_flipped_bit_and_made_anew(rows, vae, make_config, damage):
    before = encode_latents(of(rows), vae, make_config(), CPU).rows("mean", range(7), [0] * 7)
    (shard,) = shards(make_config())
    shard.write_bytes(damage(shard.read_bytes()))
    again = encode_latents(of(rows), vae, make_config(), CPU)
    assert torch.equal(again.rows("mean", range(7), [0] * 7), before)


def test_pictures_that_cannot_be_trained_on_are_reported_and_stop_nothing(rows, vae, make_config):
    rows[1].file.write_bytes(rows[1].file.read_bytes()[:90])
    rows[3].file.unlink()
    Image.new("RGB", (1, 1)).save(rows[4].file)
    Image.new("RGB", (4000, 1)).save(rows[5].file)
    for _ in range(2):  # from the encoder, then from disk
        table = encode_latents(of(rows), vae, make_config(), CPU)
        assert set(table.rejected) == {1, 3, 4, 5}
        assert "4000×1 pixels: too small or too narrow" in table.rejected[5]
        assert table.rows("mean", [0, 2], [0, 0]).isfinite().all()


def test_a_picture_that_cannot_be_read_for_a_while_is_tried_again_and_others_are_not(
    rows, vae, make_config, tmp_path
):
    away, linked = tmp_path / "away.png", rows[1].file
    linked.rename(away)
    linked.symlink_to(away)
    rows[3].file.write_bytes(b"no picture")
    pictures = of(rows)  # read for their hashes; then the link dangles
    away.rename(tmp_path / "gone.png")
    first = encode_latents(pictures, vae, make_config(), CPU)
    assert first.rejected.keys() == {1, 3}
    assert "No such file" in first.rejected[1]
    (tmp_path / "gone.png").rename(away)
    again = encode_latents(pictures, vae, make_config(), CPU)
    assert again.rejected.keys() == {3}
    assert again.rows("mean", [1], [0]).isfinite().all()


def test_a_picture_that_changes_before_it_is_encoded_is_not_stored_as_the_old_one(rows, vae, make_config):
    pictures, old = of(rows), rows[1].file.read_bytes()
    tiny.picture(60, (40, 32)).save(rows[1].file)
    table = encode_latents(pictures, vae, make_config(), CPU)
    assert table.rejected == {1: "changed since the run began"}
    rows[1].file.write_bytes(old)
    kept = encode_latents(pictures, vae, make_config(), CPU).rows("mean", [1], [0])
    live = encode_latents(pictures, vae, make_config(cache="none"), CPU).rows("mean", [1], [0])
    assert torch.allclose(kept, live, atol=2e-3)


def test_without_a_cache_the_same_is_encoded_at_every_step(rows, vae, make_config):
    rows[1].file.write_bytes(b"no picture")
    stored = encode_latents(of(rows), vae, make_config(), CPU)
    live = encode_latents(of(rows), vae, make_config(cache="none"), CPU)
    assert live.rejected.keys() == stored.rejected.keys() == {1}
    found = [table.rows("mean", [4, 2], [0, 0]) for table in (stored, live)]
    assert torch.allclose(*found, atol=2e-3)


def test_several_processes_share_the_encoding(rows, vae, make_config):
    whole = encode_latents(of(rows), vae, make_config(), CPU).rows("mean", range(7), [0] * 7)
    config = make_config(cache=make_config().output / "shared")
    for rank in (0, 1):
        encode_latents(of(rows), vae, config, CPU, Ranks(rank, 2))
    assert len(shards(config)) == 2
    table = encode_latents(of(rows), vae, config, CPU)
    assert torch.allclose(table.rows("mean", range(7), [0] * 7), whole, atol=1e-3)


def test_a_run_that_fills_the_cache_meanwhile_leaves_no_row_without_a_process(rows, vae, make_config):
    whole = encode_latents(of(rows), vae, make_config(), CPU).rows("mean", range(7), [0] * 7)
    config = make_config(cache=make_config().output / "shared")
    other = [lambda: encode_latents(of(rows[::2]), vae, config, CPU), lambda: None]
    # Both processes found the same rows missing; then the other run wrote some, and the first one its own.
    encode_latents(of(rows), vae, config, CPU, Ranks(0, 2, wait=lambda: other and other.pop(0)()))
    table = encode_latents(of(rows), vae, config, CPU, Ranks(1, 2))
    assert not table.rejected
    assert torch.allclose(table.rows("mean", range(7), [0] * 7), whole, atol=1e-3)


def test_a_shard_that_another_run_removes_while_the_folder_is_read_is_no_error(rows, vae, make_config):
    encode_latents(of(rows), vae, make_config(), CPU)
    (shard,) = shards(make_config())
    gone = shard.with_name(f"{'0' * 32}.safetensors")
    gone.symlink_to(shard.with_name("removed"))  # listed, but no longer there when it is opened
    table = encode_latents(of(rows), vae, make_config(), CPU)
    assert table.shards == [shard]


def test_faces_are_the_same_from_the_cache_and_without_one(face_pictures, make_config, tmp_path):
    seen = of(read_dataset(face_pictures).rows[:4])
    encoder = FaceFeatures(OnnxFaces.from_folder(pack(tmp_path / "pack")), ImageEncoder(*tiny.tiny_encoder()))
    stored, live = (encode_features(seen, encoder, make_config(cache=cache)) for cache in (None, "none"))
    assert stored.rejected.keys() == live.rejected.keys() == {2}
    assert "no face" in live.rejected[2]
    for name in ("face", "hidden"):
        found = [table.rows(name, [3, 0, 3], [0, 0, 0]) for table in (stored, live)]
        assert torch.allclose(*found, atol=2e-3)
        assert not torch.allclose(found[1][0], found[1][1], atol=1e-2)


def test_a_picture_that_occurs_twice_in_a_batch_is_there_twice_without_a_cache(rows, make_config):
    encoder = ClipFeatures(ImageEncoder(*tiny.tiny_encoder()), "pooled")
    stored = encode_features(of(rows), encoder, make_config())
    live = encode_features(of(rows), encoder, make_config(cache="none"))
    found = [table.rows("pooled", [4, 4, 2], [0, 0, 0]) for table in (stored, live)]
    assert torch.allclose(*found, atol=2e-3)


def test_other_runs_rows_are_neither_read_nor_held(rows, vae, make_config):
    config = make_config()
    encode_latents(of(rows[:3]), vae, config, CPU)
    table = encode_latents(of(rows[3:]), vae, config, CPU)
    assert len(shards(config)) == 2
    assert len(table.shards) == 1
    assert encode_latents(of(rows), vae, config, CPU).rows("mean", range(7), [0] * 7).isfinite().all()


def test_a_table_reads_the_same_from_disk_as_from_memory(rows, make_config, monkeypatch):
    encoder = ClipFeatures(ImageEncoder(*tiny.tiny_encoder()), "hidden")
    config = make_config(views=3)
    table = encode_features(of(rows), encoder, config)
    monkeypatch.setattr(tables, "IN_MEMORY", 0)
    lazy = encode_features(of(rows), encoder, config)
    assert torch.equal(lazy.rows("hidden", [4, 1], [2, 0]), table.rows("hidden", [4, 1], [2, 0]))


def test_the_runs_own_cache_keeps_only_what_the_run_uses(rows, vae, make_config):
    config = make_config(cache=None)
    encode_latents(of(rows, 16), vae, config, CPU)
    old = list(config.cache_folder.rglob("*.safetensors"))
    left = old[0].with_name(".shard.part.0123456789ab")  # of a run that was killed
    left.write_bytes(b"half")
    (config.cache_folder / "mine").mkdir()
    mine = config.cache_folder / "mine" / "model.safetensors"
    mine.write_bytes(b"not of the cache")
    table = encode_latents(of(rows), vae, config, CPU)
    size = (old[0].stat().st_size + 4) / 1e6
    assert (
        clean(config, [table]) == f"removed 2 files of the cache ({size:.1f} MB) that this run does not use"
    )
    assert set(config.cache_folder.rglob("*.safetensors")) == {*table.shards, mine}
    assert not left.exists()
    assert clean(config, [table]) == ""


def test_a_shared_cache_keeps_what_a_run_used_in_the_last_thirty_days(rows, vae, make_config):
    config = make_config()
    encode_latents(of(rows[:2]), vae, config, CPU)
    (old,) = shards(config)
    encode_latents(of(rows[2:4]), vae, config, CPU)
    table = encode_latents(of(rows[4:]), vae, config, CPU)
    (own,) = table.shards
    month = time.time() - 31 * 86_400
    for path in (old, own):
        os.utime(path, (month, month))
    assert clean(config, [table]).endswith("that no run has used for 30 days")
    assert not old.exists()
    assert len(shards(config)) == 2
    assert own.stat().st_mtime > time.time() - 3600  # it is used now


def test_a_run_in_another_number_format_encodes_anew(rows, make_config):
    config = make_config()
    whole = encode_latents(of(rows), tiny.tiny_sd().vae, config, CPU).rows("mean", range(7), [0] * 7)
    table = encode_latents(of(rows), tiny.tiny_sd().vae.to(torch.bfloat16), config, CPU)
    assert len({shard.parent for shard in shards(config)}) == 2
    short = table.rows("mean", range(7), [0] * 7)
    assert not torch.equal(short, whole)
    assert (short - whole).abs().mean() < 0.02 * whole.std()


def test_the_vae_gets_no_more_pixels_at_once_than_it_has_memory_for(rows, vae, make_config, monkeypatch):
    seen = []
    vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    encode_latents(of(rows), vae, make_config(cache=make_config().output / "whole"), CPU)
    monkeypatch.setattr(cache, "PIXELS", 2 * 32 * 32)
    encode_latents(of(rows), vae, make_config(flip=0.5), CPU)
    assert seen == [7] + [2] * 7


def test_several_shards_keep_the_rows_order(rows, vae, make_config, monkeypatch):
    whole = encode_latents(of(rows), vae, make_config(), CPU).rows("mean", range(7), [0] * 7)
    monkeypatch.setattr(tables, "SHARD", 3)
    split = encode_latents(of(rows), vae, make_config(cache=make_config().output / "split"), CPU)
    assert torch.allclose(split.rows("mean", range(7), [0] * 7), whole, atol=1e-3)


def test_versions_of_a_reference_differ_and_the_first_is_the_picture(rows, make_config):
    encoder = ClipFeatures(ImageEncoder(*tiny.tiny_encoder()), "pooled")
    plain = encode_features(of(rows), encoder, make_config())
    varied = encode_features(of(rows), encoder, make_config(views=3))
    assert torch.allclose(varied.rows("pooled", [2], [0]), plain.rows("pooled", [2], [0]), atol=1e-3)
    assert not torch.allclose(varied.rows("pooled", [2], [1]), varied.rows("pooled", [2], [2]), atol=1e-3)
    assert torch.equal(encoder.negative()["pooled"], torch.zeros(1, tiny.POOLED))


def test_an_encoder_that_gives_nan_is_an_error(rows, vae, make_config):
    with torch.no_grad():
        next(vae.parameters()).fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        encode_latents(of(rows), vae, make_config(), CPU)


def test_a_picture_is_read_once_for_its_hash_and_size_and_once_for_each_encoder(pictures, make_config):
    reads = Counter()

    def counted(row):
        def read():
            reads[row.name] += 1
            return row.file.read_bytes()

        return replace(row, content=read)

    rows = [counted(row) for row in read_dataset(pictures).rows]
    seen = Pictures.read(rows, lambda content: (32, 32))
    assert set(reads.values()) == {1}
    encoder = ClipFeatures(ImageEncoder(*tiny.tiny_encoder()), "pooled")
    encode_latents(seen, tiny.tiny_sd().vae, make_config(), CPU)
    encode_features(seen, encoder, make_config())
    assert set(reads.values()) == {3}


def test_a_fingerprint_sees_every_weight():
    first, second = tiny.tiny_sd().vae, tiny.tiny_sd().vae
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        list(second.parameters())[-1].view(-1)[0] += 1e-3
    assert fingerprint(first) != fingerprint(second)
