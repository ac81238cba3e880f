"""What the doctor finds without drawing, and what it advises."""

import pytest

from imprompt.app.diagnosis import advice, look


def test_what_is_found_is_said_in_words() -> None:
    found = look()
    assert "torch " in found["packages"]
    assert "onnxruntime" in found["extras"]
    assert "emoji" in found["here"]
    assert found["hub"].startswith("offline")  # the tests' own setting
    assert all(isinstance(value, str) and value and "\n" not in value for value in found.values())


WELL = {"bundled": "9 MB", "gpu": "A, 80 of 80 GiB free", "hub": "asked when needed", "self-test": "drew"}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "all is well"),
        ({"self-test": "failed: no"}, "install again with the versions"),
        ({"bundled": "INCOMPLETE, missing unet"}, "install imprompt again"),
        ({"gpu": "none"}, "no GPU"),
        ({"gpu": "A, 2 of 8 GiB free"}, "sdxl: use --offload model"),
        ({"hub": "offline (HF_HUB_OFFLINE)"}, "local files"),
    ],
)
def test_advice_follows_from_what_was_found(found: dict[str, str], said: str) -> None:
    assert any(said in line for line in advice(WELL | found))
