"""Features on the disk: the very same again, bounded, never trusted when damaged, and off by a switch."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from imprompt.adapter.encoding import FeatureCache
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.clip import Features, ImageEncoder
from imprompt.encoders.features import load
from imprompt.encoders.store import SWITCH, FeatureStore
from imprompt.errors import InputError, UsageError
from imprompt.schema.prompt import ImagePrompt
from tiny import picture, random_adapter_state, tiny_encoder, tiny_unet

KEY = {"weights": "a", "pictures": ("one",)}


def features(seed: int = 0, dtype: torch.dtype = torch.float32) -> Features:
    random = torch.Generator().manual_seed(seed)
    shapes = ((1, 8), (1, 5, 6), (1, 5, 6))
    return Features(*(torch.randn(*shape, generator=random).to(dtype) for shape in shapes))


def same(one: Features | None, other: Features) -> bool:
    return one is not None and all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("pooled", "hidden", "negative_hidden")
    )


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path, 1_000_000)


@pytest.mark.parametrize(
    "wrong",
    [{"last": torch.ones(1, 7)}, {"negative_hidden": torch.ones(3, 5, 6)}, {"hidden": torch.ones(2, 5, 6)},
     {"pooled": torch.ones(1, 8, dtype=torch.int64)}],
)  # fmt: skip
def test_a_file_whose_features_do_not_belong_together_is_refused(
    tmp_path: Path, wrong: Mapping[str, torch.Tensor]
) -> None:
    sound = {
        "pooled": torch.ones(1, 8),
        "hidden": torch.ones(1, 5, 6),
        "negative_hidden": torch.ones(1, 5, 6),
    }
    for tensors in (sound, sound | {"negative_hidden": torch.ones(1, 5, 0), "last": torch.ones(1, 5, 6)}):
        save_file(tensors, tmp_path / "a.safetensors", {"format": "imprompt-features-1"})
        load(tmp_path / "a.safetensors")
    save_file(sound | wrong, tmp_path / "a.safetensors", {"format": "imprompt-features-1"})
    with pytest.raises(InputError, match=r"do not belong together|whole numbers"):
        load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_kept_comes_back_bit_for_bit_under_its_key_alone(
    store: FeatureStore, dtype: torch.dtype
) -> None:
    store.put(KEY, features(dtype=dtype))
    found = store.get(KEY)
    assert same(found, features(dtype=dtype))
    assert found is not None
    assert found.pooled.dtype == dtype
    assert store.get({**KEY, "weights": "b"}) is None


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"x" * len(data)])
def test_what_is_damaged_is_made_anew(store: FeatureStore, tmp_path: Path, damage: object) -> None:
    store.put(KEY, features(1))
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert store.get(KEY) is None
    made = FeatureCache(store=store).get("key", lambda: features(2), KEY)
    assert same(made, features(2))
    assert same(store.get(KEY), features(2))


def test_the_folder_is_bounded_and_the_longest_unused_go_first(tmp_path: Path) -> None:
    FeatureStore(tmp_path, 1_000_000).put(KEY, features())
    (first,) = tmp_path.iterdir()
    store = FeatureStore(tmp_path, int(2.5 * first.stat().st_size))
    keys = [KEY, *({"weights": name} for name in "bc")]
    store.put(keys[1], features())
    assert store.get(keys[0]) is not None  # used again: the second is the longest unused
    store.put(keys[2], features())
    assert [store.get(key) is not None for key in keys] == [True, False, True]


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    store = FeatureStore(tmp_path / "file", 1_000_000)
    store.put(KEY, features())
    assert store.get(KEY) is None


def test_the_switch_says_how_much_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert FeatureStore.of_user() is None  # the tests' own setting
    monkeypatch.setenv(SWITCH, "lots")
    with pytest.raises(UsageError, match="IMPROMPT_FEATURE_CACHE is 'lots'; a size in MB"):
        FeatureStore.of_user()
    monkeypatch.setenv(SWITCH, "5")
    store = FeatureStore.of_user()
    assert store is not None
    store.put(KEY, features())
    assert len(list((tmp_path / "imprompt" / "features").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-that-name/cache")
    assert FeatureStore.of_user() is None


class Tally(FeatureStore):
    """A store that notes the keys it is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 1_000_000)
        self.asked: list[Mapping[str, object]] = []

    def get(self, key: Mapping[str, object]) -> Features | None:
        self.asked.append(key)
        return super().get(key)


def test_an_adapters_pictures_are_found_by_another_process_and_by_no_other_encoder(tmp_path: Path) -> None:
    model, processor = tiny_encoder()
    for name, factor in (("one", 1.0), ("other", 1.1)):
        with torch.no_grad():
            next(model.parameters()).mul_(factor)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    unet = tiny_unet()
    store = Tally(tmp_path / "store")

    def encoded(encoder: str, **fields: object) -> torch.Tensor:
        """As a process of its own would: nothing is remembered but what is in the store."""
        adapter = IPAdapter.from_state_dict(
            random_adapter_state(unet), image_encoder=ImageEncoder.from_pretrained(tmp_path / encoder)
        )
        adapter.prompt_encoder.cache = FeatureCache(store=store)
        found = adapter.prompt_encoder.encode(ImagePrompt(picture(1, (48, 32)), **fields)).features
        assert found is not None
        return found

    first = encoded("one")
    assert torch.equal(encoded("one"), first)
    assert len(list((tmp_path / "store").iterdir())) == 1
    others = [encoded("other"), encoded("one", framing="pad"), encoded("one", sharpen=0.5)]
    assert len(list((tmp_path / "store").iterdir())) == 4
    assert not any(torch.equal(other, first) for other in others)
    assert np.unique([str(sorted(key.items(), key=str)) for key in store.asked]).size == 4


def test_an_encoder_of_the_users_own_is_not_kept(tmp_path: Path) -> None:
    adapter = IPAdapter.from_state_dict(
        random_adapter_state(tiny_unet()), image_encoder=ImageEncoder(*tiny_encoder(), name="mine")
    )
    adapter.prompt_encoder.cache = FeatureCache(store=FeatureStore(tmp_path / "store", 1_000_000))
    adapter.prompt_encoder.encode(ImagePrompt(picture(1)))
    assert not (tmp_path / "store").exists()
