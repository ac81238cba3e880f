"""The provenance of a picture: versions, machine, and fingerprints of all models' weights."""

import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version

import torch

from imprompt import __version__
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.face_onnx import OnnxFaces
from imprompt.encoders.features import fingerprint as of_weights
from imprompt.encoders.features import shown_name
from imprompt.errors import ModelError
from imprompt.generation.job import Job, shows_pictures
from imprompt.generation.loading import Loaded
from imprompt.io import check_path, fingerprint


def fingerprints(job: Job, adapters: Mapping[str, IPAdapter]) -> dict[str, str]:
    """A fingerprint of each model's weights. Raises :class:`ModelError` where it differs from the recorded
    one."""
    request = job.request
    found = {f"base {job.base.name}": job.base.fingerprint}
    found |= {f"control {net.name}": net.fingerprint for net in job.controls}
    if job.motion is not None:
        found[f"motion {job.motion.name}"] = job.motion.fingerprint
    for name in job.adapters:
        source = adapters[name].checkpoint.source
        if source is not None:
            found[f"adapter {name}"] = fingerprint(source)
        if shows_pictures(job, name):
            found |= _of_encoders(name, adapters[name])
    extras = [("lora", ref.path) for ref in request.loras]
    extras += [("embedding", ref.path) for ref in request.embeddings]
    extras += [("quantize", request.quantize)] if request.quantize.endswith(".gguf") else []
    for kind, path in extras:
        if (place := check_path(path)).exists():
            found[f"{kind} {path}"] = fingerprint(place)
    _check_same(found, request.fingerprints)
    return found


def _check_same(found: Mapping[str, str], recorded: Mapping[str, str]) -> None:
    for name, known in recorded.items():
        if name in found and found[name] != known:
            raise ModelError(
                f"{name}: its weights are not those that the request was made with (fingerprint "
                f"{found[name]}, not {known}); use those, or drop the recorded fingerprints (--force)."
            )


def _of_encoders(name: str, adapter: IPAdapter) -> dict[str, str]:
    """Fingerprints of what encodes an adapter's pictures: its image encoder, its face models."""
    found = {}
    if (encoder := adapter.image_encoder) is not None:
        files = encoder.files
        found[f"image encoder of {name}"] = fingerprint(*files) if files else of_weights(encoder.model)[:12]
    if isinstance(reader := adapter.face_embedder, OnnxFaces):
        found[f"face models of {name}"] = fingerprint(*reader.files)
    return found


def provenance(job: Job, loaded: Loaded) -> dict[str, str]:
    """What a picture notes of its making: versions, device, dtype, threads, and all models with their
    fingerprints."""
    device = loaded.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    made_with = _versions() | {
        "device": f"{device} ({machine})",
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "base": f"{job.base.name} {job.base.fingerprint}",
    }
    if job.adapters:
        made_with |= _of_adapters(job, loaded)
    if job.motion is not None:
        made_with["motion"] = f"{job.motion.name} {job.motion.fingerprint}"
    if job.controls:
        made_with["controls"] = ", ".join(f"{net.name} {net.fingerprint}" for net in job.controls)
    return made_with


@cache
def _versions() -> dict[str, str]:
    made_with = {part: version(part) for part in ("torch", "diffusers", "transformers")}
    return {"imprompt": __version__, **made_with}


def _of_adapters(job: Job, loaded: Loaded) -> dict[str, str]:
    names = [loaded.adapters[name].checkpoint.name for name in job.adapters]
    # Asking for the encoder loads it, which saved features are there to avoid.
    used = [loaded.adapters[name] for name in job.adapters if shows_pictures(job, name)]
    encoders = dict.fromkeys(shown_name(getattr(each.image_encoder, "name", "none")) for each in used)
    return {"adapter": ", ".join(names), "encoder": ", ".join(encoders) or "none"}
