"""The report of ``imprompt doctor``: versions, devices, memory, local models, and a test drawing."""

import os
import platform
import re
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

from imprompt.catalog import ASSETS, adapters, bases
from imprompt.catalog.resolve import is_here
from imprompt.encoders.face_onnx import home
from imprompt.errors import ImpromptError
from imprompt.generation.engine import Engine
from imprompt.io import sha256
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import Request

_PACKAGES = ("imprompt", "torch", "diffusers", "transformers", "safetensors", "huggingface-hub", "pillow")
_EXTRAS = {
    "onnxruntime": "face: photos for face adapters",
    "peft": "lora: LoRAs for a base",
    "opencv-python-headless": "control: annotators",
    "scipy": "control: poses",
    "sentencepiece": "kolors: Kolors' text",
    "torchao": "quantize: UNets in int8 and float8",
    "gguf": "quantize: UNets in .gguf files",
    "jinja2": "evaluate: HTML reports",
    "fastapi": "serve: the page and HTTP",
    "resvg-py": "recipe: making the bundled model",
}
"""Package → the extra it belongs to, and what it is for."""
_GIB = 2**30
_NEEDS = {"sd15": 4, "sdxl": 12}
"""Base → GiB of GPU memory in float16 with adapter and image encoder: the files' sizes, and some room."""


def examine() -> dict[str, str]:
    """Findings by name; ``self-test`` starts with ``failed`` when drawing does not work."""
    found = look()
    found["self-test"] = _self_test()
    found["advice"] = "; ".join(advice(found))
    return found


def look() -> dict[str, str]:
    """Versions, devices, memory and models of this machine; nothing is drawn."""
    extras = {name: _version(name) for name in _EXTRAS}
    found = {
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {_version(name) or 'absent'}" for name in _PACKAGES),
        "extras": ", ".join(f"{name} {known}" for name, known in extras.items() if known),
        "not installed": ", ".join(
            f"{name} ({_EXTRAS[name]})" for name, known in extras.items() if not known
        ),
        "processor": f"{platform.machine()}, {os.cpu_count()} threads, torch uses {torch.get_num_threads()}",
        "memory": _memory(),
        "gpu": _gpu(),
        "bundled": _bundled(),
        "hub": "offline (HF_HUB_OFFLINE)" if HF_HUB_OFFLINE else "asked when needed",
        "cache": _cache(),
        "here": _here(),
        "face models": _face_models(),
    }
    return {name: value for name, value in found.items() if value}


def advice(found: Mapping[str, str]) -> list[str]:
    """Advice on the findings, one line each; never empty."""
    lines = []
    if found.get("self-test", "").startswith("failed"):
        lines.append("install again with the versions of constraints.txt")
    if found["bundled"].startswith("INCOMPLETE"):
        lines.append("the bundled model is incomplete: install imprompt again")
    free = re.search(r"of (\d+) GiB free", found["gpu"])
    if found["gpu"] == "none":
        lines.append("no GPU: the bundled model is quick, SD1.5 takes minutes a picture, SDXL needs a GPU")
    elif free is not None:
        tight = [name for name, needed in _NEEDS.items() if needed > float(free[1])]
        lines += [f"{', '.join(tight)}: use --offload model, GPU memory is short"] if tight else []
    if found["hub"].startswith("offline"):
        lines.append("offline: only what is listed under 'here' and local files can be used")
    return lines or ["all is well"]


def _version(name: str) -> str:
    """The installed version of a package, or an empty string."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _memory() -> str:
    try:
        total, free, size = map(os.sysconf, ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES", "SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # not every system tells
        return "unknown"
    return f"{total * size / _GIB:.0f} GiB, {free * size / _GIB:.0f} GiB free"


def _gpu() -> str:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{torch.cuda.get_device_name()}, {free / _GIB:.0f} of {total / _GIB:.0f} GiB free"
    return "Apple (mps)" if torch.backends.mps.is_available() else "none"


def _bundled() -> str:
    """The bundled model's weight files, each with the start of its SHA-256; or which are missing."""
    parts = ("unet", "vae", "text_encoder", "image_encoder")
    missing = [part for part in parts if not list((ASSETS / part).glob("*.safetensors"))]
    missing += [row.file for row in adapters().values() if row.bundled and not (ASSETS / row.file).is_file()]
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) / 1e6
    files = [
        f"{path.parent.name}/{path.stem} {sha256(path)[:12]}"
        for path in sorted(ASSETS.rglob("*.safetensors"))
    ]
    state = f"INCOMPLETE, missing {', '.join(missing)}; " if missing else ""
    return f"{state}{size:.0f} MB: {', '.join(files)}"


def _cache() -> str:
    folder = Path(HF_HUB_CACHE)
    count = len(list(folder.glob("models--*")))  # none when there is no cache
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(existing).free / _GIB
    return f"{folder}: {count} models, {free:.0f} GiB free on its disk"


def _here() -> str:
    """Aliases that need no download."""
    known = [[name for name, row in table.items() if is_here(row)] for table in (bases(), adapters())]
    return f"bases {', '.join(known[0])}; adapters {', '.join(known[1])}"


def _face_models() -> str:
    """InsightFace's packs in the folder where InsightFace keeps them."""
    packs = sorted({path.parent.name for path in home().glob("*/*.onnx")})
    return f"{', '.join(packs)} in {home()} (non-commercial)" if packs else f"none in {home()}"


def _self_test() -> str:
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
