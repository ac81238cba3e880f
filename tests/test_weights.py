"""Weight files: what is damaged, cut or something else is found out before a tensor is touched."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from imprompt.errors import ModelError
from imprompt.tensorfile import read_header
from imprompt.weights import copied_to, load_tensors, save_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(4, dtype=torch.float16)}


def packed(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_header_tells_formats_shapes_and_metadata(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"who": "me"})
    header, metadata = read_header(tmp_path / "a.safetensors")
    assert header == {"a": ("F32", (2, 3)), "b.c": ("F16", (4,))}
    assert metadata == {"who": "me"}


def test_tensors_come_back_as_they_were_written(tmp_path: Path) -> None:
    save_tensors(
        TENSORS | {"empty": torch.ones(0, 3), "one": torch.tensor(2.0)}, {}, tmp_path / "a.safetensors"
    )
    loaded = load_tensors(tmp_path / "a.safetensors")
    assert loaded["empty"].shape == (0, 3)
    assert loaded["one"] == 2
    assert all(torch.equal(loaded[key], value) for key, value in TENSORS.items())


GOOD = save(TENSORS)
REFUSED = {
    "empty": (b"", "is empty"),
    "a few bytes": (b"abc", "truncated: 3 bytes"),
    "header cut": (GOOD[:30], "truncated: its header alone"),
    "data cut": (GOOD[:-1], "truncated or damaged .*not fully covered"),
    "no data": (GOOD[: 8 + struct.unpack("<Q", GOOD[:8])[0]], "truncated or damaged .*not fully covered"),
    "something behind": (GOOD + b"x", "truncated or damaged .*not fully covered"),
    "a huge header": (packed({}, length=2**63), "it would have a header of 9,223"),
    "random": (bytes(range(200, 256)) * 9, "not a readable safetensors file"),
    "no json": (packed(b"{{{{"), "invalid JSON in header"),
    "no utf-8": (packed(b'{"\xff": 1}'), "invalid UTF-8 in header"),
    "a list": (packed([1]), "invalid JSON in header: invalid type: sequence"),
    "nested deep": (packed(b"[" * 100_000), "invalid JSON in header"),
    "a key twice": (packed(b'{"a":1,"a":2}'), "invalid JSON in header"),
    "metadata no table": (packed({"__metadata__": 3}), "expected a map"),
    "metadata no text": (packed({"__metadata__": {"a": 3}}), "expected a string"),
    "entry no table": (packed({"a": 3}), "expected struct TensorInfo"),
    "entry incomplete": (packed({"a": {"dtype": "F32"}}), "missing field `shape`"),
    "format unknown": (packed({"a": entry(0, 8, dtype="F3")}, b"x" * 8), "unknown variant `F3`"),
    "format no text": (packed({"a": entry(0, 8, dtype=3)}, b"x" * 8), "invalid type: integer `3`"),
    "shape unlike bytes": (
        packed({"a": entry(0, 8, (3,))}, b"x" * 8),
        "invalid shape, data type, or offset for tensor",
    ),
    "shape negative": (packed({"a": entry(0, 8, (-1, -2))}, b"x" * 8), "invalid value: integer `-1`"),
    "shape no number": (packed({"a": entry(0, 8, ("2",))}, b"x" * 8), 'invalid type: string \\"2\\"'),
    "shape true": (packed({"a": entry(0, 8, (True, 2))}, b"x" * 8), "invalid type: boolean `true`"),
    "shape enormous": (
        packed({"a": entry(0, 8, (2**40, 2**40))}, b"x" * 8),
        "overflow computing buffer size",
    ),
    "backwards": (packed({"a": entry(8, 0)}, b"x" * 8), "invalid offset for tensor `a`"),
    "overlapping": (
        packed({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12),
        "invalid offset for tensor `b`",
    ),
    "a hole": (packed({"a": entry(0, 8), "b": entry(12, 20)}, b"x" * 20), "invalid offset for tensor `b`"),
    "a pickle": (b"\x80\x02}q\x00.", "is a pickle under the name of a .safetensors.*imprompt convert"),
    "a git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is a picture"),
    "a web page": (b"  <!DOCTYPE html>\n<html><body>404</body></html>", "is a web page"),
    "gguf": (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_damaged_file_is_refused_with_the_reason(what: str, tmp_path: Path) -> None:
    content, message = REFUSED[what]
    path = tmp_path / "mine.safetensors"
    path.write_bytes(content)
    for reader in (read_header, load_tensors):
        with pytest.raises(ModelError, match=message) as error:
            reader(path)
        assert "mine.safetensors" in str(error.value)
        assert "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_file_with_one_wrong_byte_loads_or_is_refused_and_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, place: int, change: int
) -> None:
    path = tmp_path_factory.mktemp("flipped") / "a.safetensors"
    path.write_bytes(GOOD[:place] + bytes([GOOD[place] ^ change]) + GOOD[place + 1 :])
    try:
        loaded = load_tensors(path)
    except ModelError:
        return
    assert sum(tensor.nbytes for tensor in loaded.values()) == 32


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError) as error:
        read_header(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pt", "a", "a.ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_under_every_name(name: str, zipped: bool, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"is a pickle.*imprompt convert .*\.safetensors$"):
        read_header(tmp_path / name)


def test_a_safetensors_file_named_as_a_pickle_is_not_opened_here(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.bin")
    with pytest.raises(ModelError, match="named as a pickle"):
        read_header(tmp_path / "a.bin")


def test_what_is_missing_a_folder_or_closed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no file"):
        read_header(tmp_path / "missing.safetensors")
    with pytest.raises(ModelError, match="is a folder"):
        read_header(tmp_path)
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    path.chmod(0)
    if not os.access(path, os.R_OK):  # root may read it all the same
        with pytest.raises(ModelError, match="cannot be read"):
            read_header(path)


def test_a_written_file_has_the_usual_permissions_and_replaces_the_old_one(tmp_path: Path) -> None:
    path, usual = tmp_path / "a.safetensors", tmp_path / "usual"
    usual.write_bytes(b"")
    path.write_bytes(b"old")
    save_tensors(TENSORS, {}, path)
    assert path.stat().st_mode == usual.stat().st_mode
    assert set(tmp_path.iterdir()) == {path, usual}
    assert load_tensors(path).keys() == TENSORS.keys()


def test_tensors_read_before_a_file_was_replaced_stay_what_they_were(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(TENSORS, {}, path)
    loaded = load_tensors(path)
    save_tensors({"a": torch.zeros(100)}, {}, path)
    assert torch.equal(loaded["a"], TENSORS["a"])


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be written: there is no folder '.*such'"):
        save_tensors(TENSORS, {}, tmp_path / "no" / "such" / "x.safetensors")


def test_copies_of_weights_are_given_up_and_the_weights_are_back() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).eval()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    with copied_to(model, torch.device("meta")):
        assert model(torch.zeros(1, 2, device="meta")).device.type == "meta"
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
        assert not any(tensor.requires_grad for tensor in model.state_dict(keep_vars=True).values())
    with pytest.raises(RuntimeError, match="stop"), copied_to(model, torch.device("meta")):
        raise RuntimeError("stop")
    with copied_to(model, None):
        model(torch.zeros(1, 2))
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])
