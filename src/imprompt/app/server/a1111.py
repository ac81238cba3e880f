"""The API of stable-diffusion-webui (AUTOMATIC1111, Forge), as ``webuiapi`` and its plugins speak it.

``txt2img`` and ``img2img`` draw and wait; IP-Adapter and ControlNet units of ``alwayson_scripts.controlnet``
become image prompts and controls. What has no counterpart here is refused where it would change the picture,
and ignored where it would not. Pickles (``ipadapter_input``) are always refused.
"""

import asyncio
import io
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HTTPRequest
from PIL import Image, ImageFilter, ImageOps

from imprompt.app.server.a1111_units import read_units
from imprompt.app.server.bodies import decoded_picture, json_body
from imprompt.app.server.capabilities import capabilities
from imprompt.app.server.native import checked_request, keep
from imprompt.app.server.problems import Problem
from imprompt.app.server.queue import Job, Queue
from imprompt.app.server.waiting import as_base64, contents, drawn

router = APIRouter(prefix="/sdapi/v1", tags=["a1111"])

SAMPLERS = {
    "Euler": "euler", "Euler a": "euler-a", "DDIM": "ddim", "DDPM": "ddpm", "PLMS": "pndm",
    "DPM++ 2M": "dpm++2m", "DPM++ 2M Karras": "dpm++2m-karras", "UniPC": "unipc", "LCM": "lcm",
}  # fmt: skip
"""Their name of a sampler → ours."""
SCHEDULERS = ("automatic", "uniform", "karras")
_LORA = re.compile(r"<lora:([^:>]+)(?::([-+0-9.]+))?(?::[^>]*)?>")
_REFUSED = {
    "enable_hr": "a second pass at a larger size",
    "tiling": "tiling",
    "restore_faces": "restoring faces",
    "script_name": "scripts",
    "subseed_strength": "variation seeds",
    "styles": "styles",
    "refiner_checkpoint": "refiners",
}
"""Fields that would change the picture and have no counterpart."""
_SCRIPTS = {"controlnet", "controlnet m2m"}
_STEPS = 20  # theirs, where a client gives none


def error_body(problem: Problem) -> dict[str, Any]:
    """An error in their form, with ours inside."""
    return {
        "error": problem.code,
        "detail": problem.message,
        "body": "",
        "errors": problem.message,
        "field": problem.field,
    }


def _queue(http: HTTPRequest) -> Queue:
    found: Queue = http.app.state.queue
    return found


QueueHere = Annotated[Queue, Depends(_queue)]
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": "refused or failed",
        "content": {"application/json": {"schema": {"type": "object", "required": ["error", "detail"]}}},
    }
    for status in (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 507)
}


# ---- drawing


@router.post("/txt2img", openapi_extra=_BODY, responses=_ERRORS)
async def txt2img(http: HTTPRequest, queue: QueueHere) -> dict[str, Any]:
    """Draw from text and units."""
    values = await json_body(http, queue.settings)
    fields = _fields(values, http, queue)
    await read_units(values, fields, queue)
    return await _answer(http, queue, values, fields)


@router.post("/img2img", openapi_extra=_BODY, responses=_ERRORS)
async def img2img(http: HTTPRequest, queue: QueueHere) -> dict[str, Any]:
    """Draw from a picture, or inside its mask."""
    values = await json_body(http, queue.settings)
    fields = _fields(values, http, queue)
    pictures = values.get("init_images")
    if not isinstance(pictures, list) or len(pictures) != 1:
        raise Problem(
            422, "invalid_request", "init_images: a list of one picture is expected.", "init_images"
        )
    content = decoded_picture(pictures[0], "init_images")
    strength = _number(values, "denoising_strength", 0.75)
    source = await keep(queue, content, "init_images")
    fields |= {"task": "edit", "image": source.id, "strength": max(strength, 0.01)}
    if values.get("mask"):
        mask = await asyncio.to_thread(_mask, values, content, queue)
        fields |= {"task": "inpaint", "mask": (await keep(queue, mask, "mask")).id}
    await read_units(values, fields, queue)
    return await _answer(http, queue, values, fields)


def _fields(values: Mapping[str, Any], http: HTTPRequest, queue: Queue) -> dict[str, Any]:
    """A request's fields from theirs. Raises :class:`Problem`."""
    _check_supported(values)
    prompt, loras = _without_loras(str(values.get("prompt") or ""))
    guidance = _number(values, "cfg_scale", 7.0)
    seed = int(_number(values, "seed", -1))
    fields: dict[str, Any] = {
        "prompt": prompt,
        "loras": loras,
        "base": _base(values, http, queue),
        "guidance": guidance,
        "steps": int(_number(values, "steps", _STEPS)),
        "count": int(_number(values, "batch_size", 1) * _number(values, "n_iter", 1)),
        "size": [int(_number(values, side, 512)) for side in ("width", "height")],
        "scheduler": _scheduler(values),
    }
    if guidance > 1:
        fields["negative"] = str(values.get("negative_prompt") or "")
    if seed >= 0:
        fields["seed"] = seed
    return fields


def _check_supported(values: Mapping[str, Any]) -> None:
    """Raises :class:`Problem` for what would change the picture and has no counterpart."""
    for name, what in _REFUSED.items():
        if values.get(name):
            raise Problem(422, "not_supported", f"{name}: {what} are not part of this server.", name)
    scripts = values.get("alwayson_scripts") or {}
    for name, script in scripts.items() if isinstance(scripts, dict) else ():
        arguments = script.get("args") if isinstance(script, dict) else None
        if name.lower() not in _SCRIPTS and arguments and arguments[0]:
            text = f"alwayson_scripts: '{name[:60]}' is not part of this server."
            raise Problem(422, "not_supported", text, "alwayson_scripts")


def _number(values: Mapping[str, Any], name: str, default: float) -> float:
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 2**53:
        raise Problem(422, "invalid_request", f"{name}: a number is expected.", name)
    return value


def _without_loras(prompt: str) -> tuple[str, list[dict[str, Any]]]:
    """``<lora:NAME:WEIGHT>`` taken out of a prompt. Raises :class:`Problem`."""
    found = []
    for name, weight in _LORA.findall(prompt):
        try:
            found.append({"path": name, "weight": float(weight or 1)})
        except ValueError as error:
            raise Problem(
                422, "invalid_request", f"prompt: '{weight[:20]}' is no weight.", "prompt"
            ) from error
    return _LORA.sub("", prompt).strip(" ,") if found else prompt, found


def _base(values: Mapping[str, Any], http: HTTPRequest, queue: Queue) -> str:
    settings = values.get("override_settings") or {}
    own = settings.get("sd_model_checkpoint") if isinstance(settings, dict) else None
    return str(own or getattr(http.app.state, "a1111_base", queue.settings.base))


def _scheduler(values: Mapping[str, Any]) -> str | None:
    """Our scheduler for their sampler and scheduler. Raises :class:`Problem` for one that is not here."""
    name = values.get("sampler_name") or values.get("sampler_index")
    if not name:
        return None
    known = {theirs.lower(): ours for theirs, ours in SAMPLERS.items()}
    found = known.get(str(name).lower())
    if found is None:
        raise Problem(
            404, "sampler_not_found", f"sampler_name: '{str(name)[:60]}' is not here.", "sampler_name"
        )
    if str(values.get("scheduler") or "").lower() == "karras" and found == "dpm++2m":
        return "dpm++2m-karras"
    return found


def _mask(values: Mapping[str, Any], picture: bytes, queue: Queue) -> bytes:
    """Their mask as ours: white is repainted, blurred as they say, of the picture's size."""
    content = decoded_picture(values["mask"], "mask")
    queue.store.check(content, queue.settings.limits.picture_pixels)
    with Image.open(io.BytesIO(picture)) as opened:
        size = ImageOps.exif_transpose(opened).size
    with Image.open(io.BytesIO(content)) as opened:
        mask = opened.convert("L").resize(size)
    if values.get("inpainting_mask_invert"):
        mask = ImageOps.invert(mask)
    if blur := min(64.0, _number(values, "mask_blur", 4)):
        mask = mask.filter(ImageFilter.GaussianBlur(max(0.0, blur)))
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    return stream.getvalue()


async def _answer(
    http: HTTPRequest, queue: Queue, values: Mapping[str, Any], fields: dict[str, Any]
) -> dict[str, Any]:
    request = await checked_request(queue, fields)
    job = await drawn(queue, http, request, previews=True)
    files = await contents(queue, job.pictures)
    shown = [] if values.get("send_images") is False else [as_base64(content) for content in files]
    parameters = {name: value for name, value in values.items() if name not in ("init_images", "mask")}
    parameters.pop("alwayson_scripts", None)
    return {"images": shown, "parameters": parameters, "info": json.dumps(_info(job, files))}


def _info(job: Job, files: list[bytes]) -> dict[str, Any]:
    request = job.record or {}
    seeds = [request["seed"] + index for index in range(len(files))]
    width, height = request["size"]
    return {
        "prompt": request["prompt"], "all_prompts": [request["prompt"]] * len(files),
        "negative_prompt": request["negative"], "all_negative_prompts": [request["negative"]] * len(files),
        "seed": seeds[0], "all_seeds": seeds, "subseed": -1, "all_subseeds": [-1] * len(files),
        "subseed_strength": 0, "width": width, "height": height, "sampler_name": request["scheduler"],
        "cfg_scale": request["guidance"], "steps": request["steps"], "batch_size": len(files),
        "sd_model_name": request["base"], "sd_model_hash": "", "denoising_strength": request["strength"],
        "index_of_first_image": 0, "infotexts": [_parameters(content) for content in files],
        "job_timestamp": str(int(job.created)), "clip_skip": 1, "styles": [], "extra_generation_params": {},
    }  # fmt: skip


def _parameters(content: bytes) -> str:
    """The ``parameters`` text of a PNG, in their form; empty where there is none."""
    with Image.open(io.BytesIO(content)) as image:
        found = image.info.get("parameters", "")
    return found if isinstance(found, str) else ""


@router.post("/png-info", openapi_extra=_BODY, responses=_ERRORS)
async def png_info(http: HTTPRequest, queue: QueueHere) -> dict[str, Any]:
    """What a picture says about how it was drawn."""
    values = await json_body(http, queue.settings)
    content = decoded_picture(values.get("image"), "image")
    picture = await keep(queue, content, "image")
    record = await asyncio.to_thread(queue.store.record, picture.id)
    items = {} if record is None else {"imprompt": record.to_json()}
    return {"info": await asyncio.to_thread(_parameters, content), "items": items, "parameters": {}}


# ---- state


@router.get("/progress", responses=_ERRORS)
async def progress(http: HTTPRequest, queue: QueueHere) -> dict[str, Any]:
    """How far the client's present job is."""
    jobs = queue.unfinished(http.state.client)
    job = next((job for job in jobs if job.state == "running"), None)
    preview = as_base64(job.preview) if job is not None and job.preview else None
    state = {
        "skipped": False, "interrupted": False, "stopping_generation": False, "job": job.id if job else "",
        "job_count": len(jobs), "job_timestamp": "0", "job_no": 0,
        "sampling_step": job.step if job else 0, "sampling_steps": job.steps if job else 0,
    }  # fmt: skip
    part = job.step / job.steps if job and job.steps else 0.0
    return {
        "progress": part, "eta_relative": queue.estimate(job) or 0.0 if job else 0.0, "state": state,
        "current_image": preview, "textinfo": None,
    }  # fmt: skip


@router.post("/interrupt", responses=_ERRORS)
@router.post("/skip", responses=_ERRORS)
async def interrupt(http: HTTPRequest, queue: QueueHere) -> dict[str, Any]:
    """Stop the client's present jobs within a step."""
    for job in queue.unfinished(http.state.client):
        await queue.cancel(job)
    return {}


@router.get("/options", responses=_ERRORS)
async def options(http: HTTPRequest, queue: QueueHere) -> dict[str, Any]:
    """The options that this server has."""
    base = getattr(http.app.state, "a1111_base", queue.settings.base)
    return {"sd_model_checkpoint": base, "sd_checkpoint_hash": "", "samples_format": "png"}


@router.post("/options", openapi_extra=_BODY, responses=_ERRORS)
async def set_options(http: HTTPRequest, queue: QueueHere) -> dict[str, Any]:
    """Choose the base of this protocol's next jobs; other options have no counterpart and are ignored."""
    values = await json_body(http, queue.settings)
    base = values.get("sd_model_checkpoint")
    if base is not None:
        if base not in _names(queue):
            raise Problem(
                404, "model_not_found", f"sd_model_checkpoint: '{str(base)[:80]}' is not here.",
                "sd_model_checkpoint",
            )  # fmt: skip
        http.app.state.a1111_base = base
    return {}


def _names(queue: Queue) -> list[str]:
    return [row["name"] for row in capabilities(queue.settings)["bases"] if row["offered"]]


# ---- lists


@router.get("/samplers", responses=_ERRORS)
async def samplers() -> list[dict[str, Any]]:
    """Samplers by their names there."""
    return [{"name": name, "aliases": [ours], "options": {}} for name, ours in SAMPLERS.items()]


@router.get("/schedulers", responses=_ERRORS)
async def schedulers() -> list[dict[str, Any]]:
    """Noise schedules."""
    return [
        {"name": name, "label": name.title(), "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name in SCHEDULERS
    ]


@router.get("/sd-models", responses=_ERRORS)
async def sd_models(queue: QueueHere) -> list[dict[str, Any]]:
    """Bases."""
    return [
        {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
        for name in _names(queue)
    ]


@router.get("/loras", responses=_ERRORS)
async def loras(queue: QueueHere) -> list[dict[str, Any]]:
    """LoRAs that prompts may name."""
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in queue.settings.loras]


@router.get("/scripts", responses=_ERRORS)
async def scripts() -> dict[str, list[str]]:
    """Scripts that clients look for."""
    names = sorted(_SCRIPTS)
    return {"txt2img": names, "img2img": names}


@router.get("/cmd-flags", responses=_ERRORS)
async def cmd_flags() -> dict[str, Any]:
    """Nothing that concerns clients."""
    return {}


@router.get("/embeddings", responses=_ERRORS)
async def embeddings() -> dict[str, Any]:
    """Textual inversion is not offered over HTTP."""
    return {"loaded": {}, "skipped": {}}


@router.get("/upscalers", responses=_ERRORS)
@router.get("/face-restorers", responses=_ERRORS)
@router.get("/hypernetworks", responses=_ERRORS)
@router.get("/prompt-styles", responses=_ERRORS)
@router.get("/sd-vae", responses=_ERRORS)
async def nothing() -> list[Any]:
    """Lists that are empty here."""
    return []


@router.post("/refresh-checkpoints", responses=_ERRORS)
@router.post("/refresh-loras", responses=_ERRORS)
async def refresh() -> dict[str, Any]:
    """Models are read when the server starts."""
    return {}


# ---- ControlNet's own lists

extension = APIRouter(prefix="/controlnet", tags=["a1111"])


@extension.get("/version", responses=_ERRORS)
async def version() -> dict[str, int]:
    """Version of the extension's API."""
    return {"version": 3}


@extension.get("/model_list", responses=_ERRORS)
async def model_list(queue: QueueHere) -> dict[str, list[str]]:
    """Adapters and controls."""
    offered = capabilities(queue.settings)
    adapters = [row["name"] for row in offered["adapters"] if row["offered"]]
    return {"model_list": ["None", *adapters, *(row["name"] for row in offered["controls"] if row["here"])]}


@extension.get("/module_list", responses=_ERRORS)
async def module_list() -> dict[str, list[str]]:
    """Preprocessors."""
    from imprompt.app.server.a1111_units import MODULES

    return {"module_list": ["ip-adapter-auto", *MODULES]}
