"""What callers in Python give of a wrong kind is refused in one line, not by an error from inside."""

from pathlib import Path

import pytest

from compiled import run_unchecked

CALLS = """
import sys
from pathlib import Path

import pytest

import imprompt
from imprompt import Engine, IPAdapter, Request, TextRegion, TextRegions
from imprompt.errors import ModelError, UsageError
from tiny import picture, random_adapter_state, tiny_unet

folder = Path(sys.argv[1])
unet = tiny_unet()
adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
regions = TextRegions().attach(unet)
region = TextRegion("a cat", picture(1))
file = folder / "file"
file.write_text("not a folder")
WRONG = [
    (lambda: imprompt.generate("a cat"), UsageError, "a Request is expected, not a str: Request(prompt="),
    (lambda: Engine().run_batch(["a cat"]), UsageError, "a Request is expected, not a str"),
    (lambda: imprompt.embed("a.png", folder / "a.safetensors"), UsageError, "write ['a.png']"),
    (lambda: imprompt.sweep(Request(prompt="a"), "steps=1,2", folder / "a.png"), UsageError,
     "write ['steps=1,2']"),
    (lambda: adapter.encode(picture(1)), UsageError, "encode: a list of pictures is expected, not a Image"),
    (lambda: adapter.batch(guidance=1), UsageError, "guidance: 1; True, False or a sequence"),
    (lambda: adapter.batch(guidance="cond"), UsageError, "guidance: 'cond'; True, False or a sequence"),
    (lambda: adapter.save_pretrained(file), ModelError, f"there is no folder '{file}'"),
    (lambda: regions.set(region), UsageError, "regions: a list of TextRegion is expected"),
    (lambda: regions.set(["a cat"]), UsageError, "regions: a list of TextRegion is expected"),
    (lambda: regions.set_batch([region]), UsageError, "one such list a sample"),
]
for call, kind, said in WRONG:
    with pytest.raises(kind) as refused:
        call()
    assert said in str(refused.value), refused.value
"""


@pytest.mark.xdist_group("compiled")
def test_a_value_of_a_wrong_kind_is_refused_in_one_line(tmp_path: Path) -> None:
    run_unchecked(CALLS, tmp_path, folder=tmp_path)
