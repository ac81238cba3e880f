"""What ``imprompt doctor`` looks at: versions, devices, the hub's cache, and a drawing that must work."""

import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from imprompt.errors import ImpromptError

_PACKAGES = ("imprompt", "torch", "diffusers", "transformers", "safetensors", "huggingface-hub", "pillow")
_EXTRAS = {
    "onnxruntime": "face: photos for face adapters",
    "peft": "lora: LoRAs for a base",
    "opencv-python-headless": "control: annotators",
    "scipy": "control: poses",
    "resvg-py": "recipe: making the bundled model again",
    "sentencepiece": "kolors: Kolors' text",
    "torchao": "quantize: UNets in int8 and float8",
    "gguf": "quantize: UNets in .gguf files",
}
"""Package → the extra it belongs to and what it is for."""

_ABSENT = "absent"
_GIB = 2**30
_NEEDS = {"sd15": 4, "sdxl": 12}
"""GiB of GPU memory in float16 with adapter and image encoder: the published files' sizes and some room."""


def examine() -> dict[str, str]:
    """Findings by name, in plain words; ``self-test`` starts with ``failed`` when drawing does not work."""
    found = look()
    found["self-test"] = _self_test()
    found["advice"] = "; ".join(advice(found))
    return found


def look() -> dict[str, str]:
    """What there is on this machine, without drawing anything."""
    import torch

    found = {"python": platform.python_version()}
    found["packages"] = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    found["extras"] = ", ".join(f"{name} {known}" for name in _EXTRAS if (known := _version(name)) != _ABSENT)
    found["not installed"] = ", ".join(
        f"{name} ({what})" for name, what in _EXTRAS.items() if _version(name) == _ABSENT
    )
    found["processor"] = (
        f"{platform.machine()}, {os.cpu_count()} threads, torch uses {torch.get_num_threads()}"
    )
    found["memory"] = _memory()
    found["gpu"] = _gpu()
    found["bundled"] = _bundled()
    found["hub"] = _hub()
    found["cache"] = _cache()
    found["here"] = _here()
    found["face models"] = _face_models()
    return {name: value for name, value in found.items() if value}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return _ABSENT


def _memory() -> str:
    try:
        pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES", "SC_PAGE_SIZE")}
    except (AttributeError, ValueError, OSError):  # not told on this system
        return "unknown"
    total, free = (pages[name] * pages["SC_PAGE_SIZE"] / 2**30 for name in list(pages)[:2])
    return f"{total:.0f} GiB, {free:.0f} GiB free"


def _bundled() -> str:
    """The bundled model's weight files, each with the start of its sha256; or which are missing."""
    from imprompt.catalog import ASSETS, adapters

    parts = ("unet", "vae", "text_encoder", "image_encoder")
    missing = [part for part in parts if not list((ASSETS / part).glob("*.safetensors"))]
    missing += [row.file for row in adapters().values() if row.bundled and not (ASSETS / row.file).is_file()]
    files = sorted(ASSETS.rglob("*.safetensors"))
    hashes = [f"{path.stem} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}" for path in files]
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) / 1e6
    said = f"{size:.0f} MB: " + ", ".join(
        f"{path.parent.name}/{text}" for path, text in zip(files, hashes, strict=True)
    )
    return f"INCOMPLETE, missing {', '.join(missing)}; {said}" if missing else said


def _gpu() -> str:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    return "Apple (mps)" if torch.backends.mps.is_available() else "none"


def _hub() -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return "offline (HF_HUB_OFFLINE)" if HF_HUB_OFFLINE else "asked when needed"


def _cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE)
    count = len(list(place.glob("models--*")))  # none when there is no cache
    around = next((each for each in (place, *place.parents) if each.exists()), None)
    room = f", {shutil.disk_usage(around).free / _GIB:.0f} GiB free on its disk" if around else ""
    return f"{place}: {count} models{room}"


def _here() -> str:
    """Names of the catalogue that need no download."""
    from imprompt.catalog import adapters, bases
    from imprompt.catalog.resolve import is_here

    here = [[name for name, row in table.items() if is_here(row)] for table in (bases(), adapters())]
    return f"bases {', '.join(here[0])}; adapters {', '.join(here[1])}"


def _face_models() -> str:
    """InsightFace's packs that are where InsightFace keeps them."""
    from imprompt.encoders.face import home

    packs = sorted({path.parent.name for path in home().glob("*/*.onnx")})
    return f"{', '.join(packs)} in {home()} (non-commercial)" if packs else f"none in {home()}"


def _self_test() -> str:
    from imprompt.generation.engine import Engine
    from imprompt.schema.prompt import ImagePrompt
    from imprompt.schema.request import Request

    started = time.monotonic()
    try:
        engine = Engine()
        first = engine.run(Request(prompt="a cat", steps=4, seed=1))
        request = Request(prompt="an owl", images=(ImagePrompt("cat"),), steps=4, seed=1)
        second = engine.run(request, pictures={"cat": first.images[0]})
    except ImpromptError as error:
        return f"failed: {error}"
    if first.images[0].tobytes() == second.images[0].tobytes():
        return "failed: the image prompt changed nothing"
    return f"drew with text and with a picture in {time.monotonic() - started:.1f} s"


def advice(found: Mapping[str, str]) -> list[str]:
    """What to do, by what was found; never empty."""
    said = []
    if found.get("self-test", "").startswith("failed"):
        said.append("install again with the versions of constraints.txt")
    if found["bundled"].startswith("INCOMPLETE"):
        said.append("the bundled model is incomplete: install imprompt again")
    memory = re.search(r"of (\d+) GiB free", found["gpu"])
    if found["gpu"] == "none":
        said.append(
            "no GPU: the bundled model is quick, SD1.5 takes minutes a picture, SDXL is not for this machine"
        )
    elif memory is not None:
        room = float(memory[1])
        tight = [name for name, needed in _NEEDS.items() if needed > room]
        if tight:
            said.append(f"{', '.join(tight)}: use --offload model, GPU memory is short")
    if found["hub"].startswith("offline"):
        said.append("offline: only what is listed under 'here' and local files can be used")
    return said or ["all is well"]
