"""A base's UNet in fewer bits: the adapter attaches to it, draws nearly the same, and comes off exactly."""

import gc
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import UNet2DConditionModel

from imprompt.errors import ModelError, UsageError
from imprompt.generation.engine import Engine
from imprompt.schema.request import Request
from quantized import gguf_file
from tiny import tiny_sd

FAR = {"int8": 0.02, "float8": 0.06, "gguf": 0.02}
"""How far a value of the picture, 0 to 1, may be from the unquantised one's."""


def drawn(engine: Engine, request: Request) -> np.ndarray:
    return np.asarray(engine.run(request).images[0]) / 255


@pytest.mark.parametrize("kind", FAR)
def test_an_adapter_draws_on_a_quantised_unet(kind: str, common, pictures, tmp_path: Path) -> None:
    how = str(gguf_file(tmp_path / "unet.gguf", tiny_sd().unet)) if kind == "gguf" else kind
    if kind != "gguf":
        pytest.importorskip("torchao", reason=f"{kind} needs torchao, in the extra 'quantize'")
    asked = Request(prompt="a cat", images=[pictures / "ref.png"], scale=1.0, **common)
    bare = Request(prompt="a cat", **{name: value for name, value in common.items() if name != "adapter"})
    whole, effect = drawn(Engine(), asked), np.abs(drawn(Engine(), asked) - drawn(Engine(), bare)).max()
    engine = Engine()
    before = drawn(engine, bare.replace(quantize=how))
    shown = drawn(engine, asked.replace(quantize=how))
    unets = [each for each in gc.get_objects() if type(each) is UNet2DConditionModel]
    layers = [unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_q") for unet in unets]
    names = {"int8": "Int8Tensor", "float8": "Float8Tensor", "gguf": "GGUFParameter"}
    assert names[kind] in {type(layer.weight).__name__ for layer in layers}
    far = np.abs(shown - whole).max()
    print(f"{kind}: {far:.4f} from the unquantised picture; the prompt moves it by {effect:.4f}")
    assert 0 < far <= FAR[kind] < effect
    assert np.array_equal(drawn(engine, bare.replace(quantize=how)), before)


def test_a_denoisers_file_that_changed_is_an_error(common, tmp_path: Path) -> None:
    bare = {name: value for name, value in common.items() if name != "adapter"}
    how = gguf_file(tmp_path / "unet.gguf", tiny_sd().unet)
    request = Engine().run(Request(prompt="a", **bare, quantize=str(how))).request
    Engine().run(request)
    how.unlink()
    gguf_file(how, tiny_sd(seed=1).unet)
    with pytest.raises(ModelError, match=r"quantize .*unet\.gguf: its weights are not those"):
        Engine().run(request)


def test_what_cannot_be_quantised_is_said_in_one_line(common, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="reading .gguf needs the extra 'quantize'")
    bare = {name: value for name, value in common.items() if name != "adapter"}
    with pytest.raises(ModelError, match=r"there is no file 'none\.gguf'"):
        Engine().run(Request(prompt="a", **bare, quantize="none.gguf"))
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(ModelError, match=r"no\.gguf' is no UNet of base") as error:
        Engine().run(Request(prompt="a", **bare, quantize=str(tmp_path / "no.gguf")))
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="quantize"):
        Request(prompt="a", quantize="int3")
    with pytest.raises(UsageError, match="quantize: has no effect on clips"):
        Request(task="animate", prompt="a", quantize="int8")


def test_without_torchao_one_line_says_what_to_install(common, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    bare = {name: value for name, value in common.items() if name != "adapter"}
    with pytest.raises(ModelError, match=r"needs torchao: pip install 'imprompt\[quantize\]'"):
        Engine().run(Request(prompt="a", **bare, quantize="int8"))
