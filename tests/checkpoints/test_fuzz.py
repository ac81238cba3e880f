"""Hundreds of damaged adapter files: each is read, or refused in one line; none crashes."""

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from imprompt.checkpoints.checkpoint import read
from imprompt.checkpoints.convert import convert
from imprompt.checkpoints.inspect import inspect
from imprompt.errors import ImpromptError
from layouts import SMALL, SMALL_TRANSFORMERS, small


def originals() -> dict[str, bytes]:
    """Small adapter files of every layout."""
    flat = {
        variant: {
            f"{part}.{key}": value for part, keys in small(variant).items() for key, value in keys.items()
        }
        for variant in SMALL
    }
    flat |= {
        variant: {key: torch.randn(shape) for key, shape in shapes.items()}
        for variant, shapes in SMALL_TRANSFORMERS.items()
    }
    return {name: save(tensors, {"imprompt.variant": name}) for name, tensors in flat.items()}


def damaged(content: bytes, dice: random.Random) -> bytes:
    """One of the things that happen to files."""
    (length,) = struct.unpack("<Q", content[:8])
    header, place = content[8 : 8 + length], dice.randrange(len(content))
    match dice.randrange(9):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + bytes([content[place] ^ dice.randrange(1, 256)]) + content[place + 1 :]
        case 2:
            spot = 8 + dice.randrange(length)
            return content[:spot] + bytes([dice.randrange(256)]) + content[spot + 1 :]
        case 3:
            return content[:place] + dice.randbytes(dice.randrange(1, 200)) + content[place:]
        case 4:
            words = [
                b"F32",
                b"F16",
                b"shape",
                b"weight",
                b"to_k_ip",
                b"image_proj",
                b"imprompt",
                b"data_offsets",
            ]
            return (
                content[:8] + header.replace(dice.choice(words), dice.choice(words)) + content[8 + length :]
            )
        case 5:
            return struct.pack("<Q", dice.choice([0, 1, length - 1, length + 1, 2**32, 2**63])) + content[8:]
        case 6:
            a, b = sorted(dice.randrange(len(content)) for _ in range(2))
            return content[:a] + content[b:]
        case 7:
            digits = [i for i, byte in enumerate(header) if 48 <= byte < 58]
            spot = 8 + dice.choice(digits)
            return content[:spot] + str(dice.randrange(10)).encode() + content[spot + 1 :]
        case _:
            return dice.randbytes(dice.randrange(0, 3000))


@pytest.mark.parametrize("seed", range(5))
def test_a_hundred_damaged_files_are_read_or_refused_in_one_line(seed: int, tmp_path: Path) -> None:
    dice, good = random.Random(seed), originals()
    for number in range(100):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(damaged(good[dice.choice(list(good))], dice))
        for door in (inspect, read, lambda file: convert(file, tmp_path / "out" / file.name)):
            assert said(door, path).count("\n") == 0


def said(door: Callable[[Path], object], path: Path) -> str:
    """The message with which a file is refused; empty if it is not."""
    try:
        door(path)
    except ImpromptError as error:
        return str(error)
    return ""


def test_weights_in_memory_survive_what_happens_to_their_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(originals()["linear"])
    loaded = read(path)
    before = {key: value.clone() for key, value in loaded.state["image_proj"].items()}
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
        file.truncate(10)
    assert all(torch.equal(loaded.state["image_proj"][key], value) for key, value in before.items())
