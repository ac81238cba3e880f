"""What ``imprompt doctor`` looks at: versions, devices, the hub's cache, and a drawing that must work."""

import hashlib
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from imprompt.errors import ImpromptError

_PACKAGES = ("imprompt", "torch", "diffusers", "transformers", "safetensors", "huggingface-hub", "pillow")
_EXTRAS = ("peft", "matplotlib", "resvg-py")


def examine() -> dict[str, str]:
    """Findings by name, in plain words; ``self-test`` starts with ``failed`` when drawing does not work."""
    import torch

    found = {"python": platform.python_version()}
    found["packages"] = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    found["extras"] = ", ".join(f"{name} {_version(name)}" for name in _EXTRAS)
    found["processor"] = (
        f"{platform.machine()}, {os.cpu_count()} threads, torch uses {torch.get_num_threads()}"
    )
    found["memory"] = _memory()
    found["gpu"] = _gpu()
    found["bundled"] = _bundled()
    found["hub"] = "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else "asked when needed"
    found["cache"] = _cache()
    found["self-test"] = _self_test()
    found["advice"] = _advice(found)
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _memory() -> str:
    try:
        pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES", "SC_PAGE_SIZE")}
    except (AttributeError, ValueError, OSError):  # not told on this system
        return "unknown"
    total, free = (pages[name] * pages["SC_PAGE_SIZE"] / 2**30 for name in list(pages)[:2])
    return f"{total:.0f} GiB, {free:.0f} GiB free"


def _bundled() -> str:
    """The bundled model's weight files, each with the start of its sha256; or which are missing."""
    from imprompt.generation.catalogue import ADAPTERS, BUNDLED
    from imprompt.generation.models import EMOJI

    parts = ("unet", "vae", "text_encoder", "image_encoder")
    missing = [part for part in parts if not list((EMOJI / part).glob("*.safetensors"))]
    missing += [
        row.file for row in ADAPTERS.values() if row.repo == BUNDLED and not (EMOJI / row.file).is_file()
    ]
    files = sorted(EMOJI.rglob("*.safetensors"))
    hashes = [f"{path.stem} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}" for path in files]
    size = sum(path.stat().st_size for path in EMOJI.rglob("*") if path.is_file()) / 1e6
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


def _cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = Path(HF_HUB_CACHE).glob("models--*")  # empty when there is no cache
    names = sorted(folder.name.removeprefix("models--").replace("--", "/") for folder in folders)
    return f"{HF_HUB_CACHE}: {', '.join(names) or 'no models'}"


def _self_test() -> str:
    from imprompt.generation.engine import Engine
    from imprompt.generation.request import ImageRef, Request

    started = time.monotonic()
    try:
        engine = Engine()
        first = engine.run(Request(prompt="a cat", steps=4, seed=1))
        request = Request(prompt="an owl", images=(ImageRef(path="cat"),), steps=4, seed=1)
        second = engine.run(request, pictures={"cat": first.images[0]})
    except ImpromptError as error:
        return f"failed: {error}"
    if first.images[0].tobytes() == second.images[0].tobytes():
        return "failed: the image prompt changed nothing"
    return f"drew with text and with a picture in {time.monotonic() - started:.1f} s"


def _advice(found: dict[str, str]) -> str:
    if found["self-test"].startswith("failed"):
        return "install again with the versions of constraints.txt"
    if found["gpu"] == "none":
        return (
            "no GPU: the bundled model is quick, SD1.5 takes minutes a picture, SDXL is not for this machine"
        )
    return "all is well; --offload model helps where GPU memory is short"
