"""ControlNets embed what they follow once a generation, and nothing of it reaches the next."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor

import tiny
from controls import saved, tiny_controlnet, tiny_union
from imprompt.generation.engine import Engine
from imprompt.schema.request import ControlRef, Request


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("nets")
    made = {"sd15": tiny_controlnet(), "union": tiny_union(), "xl": tiny.tiny_sdxl()}
    return {name: saved(model, folder / name) for name, model in made.items()}


@pytest.fixture
def asked(common, pictures, nets):
    """A request that follows pictures with a kind of net."""

    def of(kind: str, *names: str, **more: object) -> Request:
        own = {key: value for key, value in common.items() if key != "adapter"}
        fields: dict[str, Any] = {}
        if kind == "union":
            fields |= {"base": nets["xl"], "size": 32}
        model = nets[kind] + ":canny" * (kind == "union")
        refs = [ControlRef(kind="none", path=pictures / f"{name}.png", model=model) for name in names]
        return Request(
            **{**own, "prompt": "a cat", "guidance": 4, "steps": 3, "controls": refs, **fields, **more}
        )

    return of


def drawn(engine: Engine, request: Request) -> np.ndarray:
    return np.stack([np.asarray(image) for image in engine.run(request).images])


@pytest.mark.parametrize(
    ("kind", "names"), [("sd15", ["ref"]), ("sd15", ["ref", "other"]), ("union", ["ref"])]
)
def test_each_picture_is_embedded_at_the_first_step_only(engine, asked, monkeypatch, kind, names) -> None:
    count = 0

    def counting(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any) -> Tensor:
            nonlocal count
            count += 1
            return forward(*args)

        return counted

    embedding = ControlNetConditioningEmbedding
    monkeypatch.setattr(embedding, "forward", counting(embedding.forward))
    for already in (0, len(names)):
        engine.run(asked(kind, *names))
        assert count == already + len(names)


@pytest.mark.parametrize("more", [{}, {"offload": "sequential"}, {"count": 2}])
def test_another_picture_is_drawn_as_by_a_new_engine(asked, more) -> None:
    if more.get("offload") and not torch.cuda.is_available():
        pytest.skip("offload needs a GPU")
    engine = Engine()
    first, second = (drawn(engine, asked("sd15", name, **more)) for name in ("ref", "other"))
    assert not np.array_equal(first, second)
    assert np.array_equal(second, drawn(Engine(), asked("sd15", "other", **more)))
    assert np.array_equal(first, drawn(engine, asked("sd15", "ref", **more)))
