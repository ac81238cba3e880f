"""Hashes of weight files: they tell every change, and are remembered only as long as they are true."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imprompt.catalog import ASSETS
from imprompt.errors import InputError
from imprompt.generation.families import find_base
from imprompt.io import fingerprint, sha256

ASK = "import sys; from imprompt.io import sha256; print(sha256(sys.argv[1]))"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "imprompt" / "sha256.json"


def asked(path: Path, home: Path) -> str:
    """The hash that a new process gives, whose cache is at ``home``."""
    env = {**os.environ, "XDG_CACHE_HOME": str(home.parent.parent)}
    run = subprocess.run([sys.executable, "-c", ASK, str(path)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def large(path: Path, byte: bytes = b"x") -> Path:
    path.write_bytes(byte * 16_000_001)
    return path


def true(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_any_byte_and_any_file_of_a_model_count(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(b"1")
    first = fingerprint(*files)
    assert fingerprint(*files[:1]) != first
    files[1].write_bytes(b"22")
    assert fingerprint(*files) != first


def test_a_large_files_hash_is_remembered_and_forgotten_when_the_file_changes(
    tmp_path: Path, home: Path
) -> None:
    path = large(tmp_path / "a.safetensors")
    first = true(path)
    assert asked(path, home) == first
    assert home.read_text().count(first) == 1
    home.write_text(home.read_text().replace(first, "0" * 64))
    assert asked(path, home) == "0" * 64, "read from the cache"
    times = path.stat()
    large(path, b"y")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time of change
    assert asked(path, home) == true(path)


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 3}'])
def test_a_damaged_cache_is_made_anew(content: str, tmp_path: Path, home: Path) -> None:
    home.parent.mkdir(parents=True)
    home.write_text(content)
    path = large(tmp_path / "a")
    assert asked(path, home) == true(path)
    assert true(path) in home.read_text()


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path, home: Path) -> None:
    home.parent.parent.write_text("a file where the folder should be")
    path = large(tmp_path / "a")
    assert asked(path, home) == true(path)


def test_a_file_that_is_gone_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        sha256(tmp_path / "none")


def test_a_bases_files_are_its_parts() -> None:
    files = find_base("emoji").weight_files
    assert {path.parent.name for path in files} == {"unet", "vae", "text_encoder"}
    assert all(path.is_relative_to(ASSETS) for path in files)
