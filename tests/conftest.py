"""Shared by all tests: shapes written in the core's signatures are checked at run time, and `tiny` is
importable."""

import gc
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["IMPROMPT_FEATURE_CACHE"] = "0"  # features of an earlier run would hide what encoders do now
sys.path.insert(0, str(Path(__file__).parent))

import pytest

import checked

checked.install()
gc.set_threshold(100_000, 20, 20)  # imports make a million objects that stay
LONGEST = (
    "server", "test_trainer.py", "test_diffusers.py", "test_video.py", "test_commands.py", "test_bundled.py",
    "test_transformer_bases.py",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where processes share the tests (``--dist loadgroup``), those of a file, and all that ask one server,
    go to one of them: what they share is made once. The longest come first, so that all end together."""

    def group(item: pytest.Item) -> Path:
        return item.path.parent if item.path.parent.name == "server" else item.path

    items.sort(
        key=lambda item: LONGEST.index(name) if (name := group(item).name) in LONGEST else len(LONGEST)
    )
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(group(item))))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Say it where pytest-xdist ignores the groups: servers and bases are then made by each process."""
    if session.config.getoption("loadgroup", False) and any("@" not in item.nodeid for item in session.items):
        warnings.warn(
            "tests are not kept in their groups; use pytest < 9.2", pytest.PytestWarning, stacklevel=1
        )


@pytest.fixture(scope="module", autouse=True)
def _what_is_loaded_stays() -> None:
    """Let no ``gc.collect()`` look through what was imported: that took a quarter of all time."""
    gc.collect()
    gc.freeze()
