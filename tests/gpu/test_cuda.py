"""Drawing, compiling and training on a CUDA device: the same pictures as on the CPU and as diffusers draws.
Float32 products are exact here (no TF32)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tiny
import tinydit
from compiled import run_unchecked
from imprompt import Engine, ImagePrompt, IPAdapter, Request
from imprompt.catalog import ASSETS
from imprompt.training import TrainConfig
from imprompt.training.trainer import train

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PLAIN = Request(prompt="a cat", base="emoji", seed=1, steps=8, guidance=5.0, device="cpu")
ASKED = PLAIN.replace(adapter="emoji-plus", images=[ImagePrompt("one", scale=0.6)])


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.fixture(scope="module")
def shown() -> dict[str, Image.Image]:
    names = {"one": "an owl", "two": "a red apple"}
    return {name: Engine().run(PLAIN.replace(prompt=text)).images[0] for name, text in names.items()}


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    found = Image.new("L", (128, 128))
    found.paste(255, (0, 0, 64, 128))
    return found


COMPILED = """
import sys

import numpy as np
import torch

from imprompt import Engine, ImagePrompt, Request

torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
(pictures,) = sys.argv[1:]
plain = Request(prompt="a cat", seed=1, steps=8, guidance=5.0, device="cuda", dtype="float32")
engine = Engine()
for prompt in (
    ImagePrompt(f"{pictures}/one.png", scale=0.6), ImagePrompt(f"{pictures}/two.png", scale=0.9, end=0.7)
):
    request = plain.replace(adapter="emoji-plus", images=[prompt])
    wanted, drawn = (
        np.asarray(each.images[0]).astype(float)
        for each in (Engine().run(request), engine.run(request.replace(compile="regional")))
    )
    assert np.abs(wanted - drawn).mean() < 1, np.abs(wanted - drawn).mean()
"""


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(float) for image in images])


def error(one: np.ndarray, two: np.ndarray) -> float:
    """The mean difference of pixels, of 255."""
    return float(np.abs(one - two).mean())


IMAGES = {
    "one picture": [ImagePrompt("one", scale=0.6)],
    "two pictures": [ImagePrompt(("one", "two"), scale=0.8)],
    "two prompts": [ImagePrompt("one", scale=0.4), ImagePrompt("two", scale=0.5, start=0.2, end=0.8)],
    "a mask": [ImagePrompt("one", mask="mask"), ImagePrompt("two", scaling="k+v")],
    "a curve": [ImagePrompt("one", curve="0:1,1:0")],
}


@pytest.mark.parametrize("case", IMAGES)
def test_cuda_draws_what_the_cpu_draws(case: str, shown: dict[str, Image.Image], mask: Image.Image) -> None:
    request = ASKED.replace(images=IMAGES[case])
    pictures = shown | {"mask": mask}
    same_noise = Version(torch.__version__) >= Version("2.13")  # in half precision, from the same seed
    for dtype, limit in (("float32", 0.5), ("bfloat16", 8.0), ("float16", 2.0)):
        drawn = Engine().run(request.replace(device=DEVICE, dtype=dtype), pictures=pictures).images
        reference = request.replace(dtype="float32" if same_noise else dtype)
        wanted = Engine().run(reference, pictures=pictures).images
        assert error(pixels(drawn), pixels(wanted)) < limit, dtype


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 0.2), ("bfloat16", 4.0)])
def test_cuda_draws_what_diffusers_draws(dtype: str, limit: float, shown: dict[str, Image.Image]) -> None:
    request = ASKED.replace(device=DEVICE, dtype=dtype)
    drawn = pixels(Engine().run(request, pictures=shown).images)
    pipe = StableDiffusionPipeline.from_pretrained(ASSETS, torch_dtype=getattr(torch, dtype))
    name = "ip-adapter-plus_emoji.safetensors"
    pipe.load_ip_adapter(ASSETS, subfolder="adapters", weight_name=name, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.6)
    pipe.to(DEVICE).set_progress_bar_config(disable=True)
    wanted = pipe(
        "a cat", ip_adapter_image=shown["one"], generator=torch.Generator().manual_seed(1),
        num_inference_steps=8, guidance_scale=5.0, height=128, width=128,
    ).images  # fmt: skip
    assert error(drawn, pixels(wanted)) < limit


def test_a_batch_equals_its_pictures_alone(shown: dict[str, Image.Image]) -> None:
    engine = Engine()
    request = ASKED.replace(device=DEVICE, dtype="float32", count=4)
    together = pixels(engine.run(request, pictures=shown).images)
    alone = pixels(engine.run(request.replace(exact=True), pictures=shown).images)
    assert error(together, alone) < 0.1


@pytest.mark.parametrize("how", ["adapter", "model"])
def test_offloading_draws_the_same(shown: dict[str, Image.Image], how: str) -> None:
    request = ASKED.replace(device=DEVICE, dtype="float32")
    wanted = pixels(Engine().run(request, pictures=shown).images)
    drawn = Engine().run(request.replace(offload=how), pictures=shown).images
    assert error(pixels(drawn), wanted) < 0.1


def test_an_adapter_may_wait_in_main_memory(shown: dict[str, Image.Image]) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(ASSETS, safety_checker=None).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    adapter = IPAdapter.from_pretrained("emoji-plus").attach(pipe)

    def draw() -> np.ndarray:
        adapter.set_prompt(shown["one"], scale=0.6)
        random = torch.Generator(DEVICE).manual_seed(1)
        return pipe("a cat", num_inference_steps=4, generator=random, output_type="np").images

    there, held = draw(), torch.cuda.memory_allocated()
    adapter.enable_cpu_offload(DEVICE)
    assert np.abs(draw() - there).mean() < 1e-3
    assert {weight.device.type for weight in adapter.parameters()} == {"cpu"}
    assert held - torch.cuda.memory_allocated() > 0.95 * sum(weight.nbytes for weight in adapter.parameters())


def test_a_compiled_base_draws_the_same(tmp_path: Path, shown: dict[str, Image.Image]) -> None:
    for name, picture in shown.items():
        picture.save(tmp_path / f"{name}.png")
    run_unchecked(COMPILED, tmp_path, folder=Path(__file__).parent)


def test_a_step_never_waits_for_the_device() -> None:
    pipe = tiny.tiny_sd().to(DEVICE)
    adapter = IPAdapter.from_state_dict(tiny.random_adapter_state(pipe.unet)).attach(pipe.unet)
    adapter.batch(guidance=True)
    adapter.set_prompt(ImagePrompt(features=torch.randn(1, tiny.POOLED), end=0.8, mask=torch.ones(8, 8)))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    sample, text = torch.randn(2, 4, 8, 8, device=DEVICE), torch.randn(2, 7, tiny.TEXT_WIDTH, device=DEVICE)
    timestep = torch.tensor(500, device=DEVICE)
    with torch.inference_mode():
        pipe.unet(sample, timestep, text)
        torch.cuda.set_sync_debug_mode("error")
        try:
            pipe.unet(sample, timestep, text)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("count", [1, 4])
def test_a_change_of_strength_copies_two_tables_to_the_device(count: int) -> None:
    pipe = tiny.tiny_sd().to(DEVICE)
    adapter = IPAdapter.from_state_dict(tiny.random_adapter_state(pipe.unet)).to(DEVICE).attach(pipe.unet)
    adapter.batch(guidance=True)
    shown = torch.randn(count, tiny.POOLED, device=DEVICE)
    prompts = [ImagePrompt(features=each[None], mask=torch.eye(8)) for each in shown]
    sample, text = torch.randn(2, 4, 8, 8, device=DEVICE), torch.randn(2, 7, tiny.TEXT_WIDTH, device=DEVICE)
    timestep = torch.tensor(500, device=DEVICE)

    def step(scale: float) -> Tensor:
        adapter.set_prompt(prompts, scale=scale)
        return pipe.unet(sample, timestep, text).sample

    with torch.inference_mode():
        first = step(0.4)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            second = step(0.8)
        copies = [e for e in profiler.events() if e.name.startswith(("Memcpy HtoD", "Memcpy DtoH"))]
        torch.cuda.set_sync_debug_mode("error")
        try:
            third = step(0.4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(copies) <= 2, [copy.name for copy in copies]
    assert torch.equal(third, first)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("base", ["flux", "sd3"])
def test_transformers_draw_what_the_cpu_draws(base: str) -> None:
    call = {"num_inference_steps": 3, "output_type": "latent", "height": 32, "width": 48}
    drawn = []
    for device in ("cpu", DEVICE):
        if base == "flux":
            pipe, texts = tinydit.flux().to(device), tinydit.text()
            adapter = IPAdapter.from_state_dict(tinydit.instantx_flux_state())
            features = torch.ones(1, 24)
        else:
            pipe, texts = tinydit.sd3().to(device), tinydit.text(pooled=64) | tinydit.negative(pooled=64)
            adapter = IPAdapter.from_state_dict(tinydit.instantx_sd3_state())
            features = torch.linspace(-1, 1, 16 * 24).view(1, 16, 24)
        adapter.attach(pipe)
        adapter.set_prompt(ImagePrompt(features=features, scale=0.8, end=0.9))
        texts = {name: value.to(device) for name, value in texts.items()}
        drawn.append(pipe(generator=torch.Generator().manual_seed(0), **call, **texts).images.cpu())
    torch.testing.assert_close(*drawn, atol=1e-3, rtol=1e-3)


def training(folder: Path, shown: dict[str, Image.Image], name: str, **fields: Any) -> TrainConfig:
    """A run of a few steps on turned pictures."""
    data = folder / "data"
    if not data.exists():
        data.mkdir()
        for word, picture in shown.items():
            for n in range(3):
                picture.rotate(n).save(data / f"{word}{n}.png")
                (data / f"{word}{n}.txt").write_text(word)
    return TrainConfig(
        data=str(data), output=folder / name, batch=2, steps=4, checkpoint_every=2, sample_every=0,
        device=DEVICE, trackers=(), quiet=True, **fields,
    )  # fmt: skip


def test_a_step_as_a_graph_trains_as_one_without(tmp_path: Path, shown: dict[str, Image.Image]) -> None:
    fields = {"dtype": "float32", "save_dtype": "float32", "latent": "mean"}
    started = load_file(ASSETS / "adapters" / "ip-adapter-plus_emoji.safetensors")
    with_, without = (
        load_file(train(training(tmp_path, shown, str(graphs), cuda_graphs=graphs, **fields)))
        for graphs in (True, False)
    )
    for name, before in started.items():
        moved, other = (each[name] - before.to(each[name]) for each in (with_, without))
        assert (moved - other).norm() <= 0.02 * other.norm(), name
    assert any(not torch.equal(with_[name], before.to(with_[name])) for name, before in started.items())


def test_training_on_cuda_writes_an_adapter_that_draws(tmp_path: Path, shown: dict[str, Image.Image]) -> None:
    config = training(tmp_path, shown, "run")
    first = train(config)
    again = train(config.model_copy(update={"steps": 6, "resume": True}))
    assert first == again
    request = ASKED.replace(adapter=str(again), device=DEVICE)
    assert Engine().run(request, pictures=shown).images[0].size == (128, 128)
