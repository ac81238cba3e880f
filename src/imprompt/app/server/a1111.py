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
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from PIL import Image, ImageFilter, ImageOps
from pydantic import BaseModel, Field

from imprompt.app.server.a1111_settings import check_fields, check_options
from imprompt.app.server.a1111_units import FRAMINGS, framed, looked_up, read_units
from imprompt.app.server.bases import Served, served
from imprompt.app.server.bodies import Body, checked, decoded_picture, described, json_body
from imprompt.app.server.capabilities import offered_bases
from imprompt.app.server.jobs import Job
from imprompt.app.server.problems import Problem, refused
from imprompt.app.server.protocols import (
    QueueHere,
    as_base64,
    checked_request,
    contents,
    drawn,
    encoded,
    errors,
    keep,
    keep_encoded,
)
from imprompt.app.server.queue import Queue
from imprompt.encoders.images import as_bytes, load_image
from imprompt.errors import ImpromptError
from imprompt.io import seed_for

SAMPLERS = {
    "Euler": "euler", "Euler a": "euler-a", "DDIM": "ddim", "DDPM": "ddpm", "PLMS": "pndm",
    "DPM++ 2M": "dpm++2m", "DPM++ 2M Karras": "dpm++2m-karras", "UniPC": "unipc", "LCM": "lcm",
}  # fmt: skip
"""Their name of a sampler → ours."""
SCHEDULERS = ("automatic", "uniform", "karras")
_ANY_SCHEDULER = ("", "automatic", "use same scheduler", "uniform")
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
_THEIR_FIELDS = {"strength": "denoising_strength"}
"""Fields of a request that can be wrong beside others, by the names that clients sent."""


class ErrorAnswer(BaseModel):
    """An error in their form, with our field inside."""

    error: str
    detail: str
    body: str = ""
    errors: str
    field: str | None


def error_body(problem: Problem) -> dict[str, Any]:
    """An error in their form."""
    answer = ErrorAnswer(
        error=problem.code, detail=problem.message, errors=problem.message, field=problem.field
    )
    return answer.model_dump()


class TextToImage(Body):
    """What ``txt2img`` takes. Fields without a counterpart are refused by name, or ignored."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    steps: int = 20
    cfg_scale: float | None = None
    """7 if left out; 1 on FLUX bases."""
    distilled_cfg_scale: float | None = None
    """Forge's: the guidance that FLUX bases take as an input; others have none."""
    batch_size: int = Field(default=1, ge=1)
    n_iter: int = Field(default=1, ge=1)
    width: int = Field(default=512, ge=1)
    height: int = Field(default=512, ge=1)
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str = "automatic"
    eta: float | None = None
    """DDIM: 0 or 1, which is DDPM. Euler a: 1 or 0, which is Euler. Other samplers have none."""
    override_settings: dict[str, Any] = Field(default_factory=dict)
    alwayson_scripts: dict[str, Any] = Field(default_factory=dict)
    send_images: bool = True


class ImageToImage(TextToImage):
    """What ``img2img`` takes."""

    init_images: list[Any] = Field(min_length=1, max_length=1)
    """One picture in base64."""
    denoising_strength: float = 0.75
    resize_mode: str | int = 0
    mask: str | None = None
    mask_blur: float | None = Field(default=None, ge=0)
    """In pixels, for both directions; if left out, those of each."""
    mask_blur_x: float = Field(default=4.0, ge=0)
    mask_blur_y: float = Field(default=4.0, ge=0)
    inpainting_mask_invert: bool = False


class PictureBody(Body):
    """A picture in base64."""

    image: str = ""


class Options(Body):
    """The one option that can be set; others that would change pictures are refused."""

    sd_model_checkpoint: str | None = None


router = APIRouter(prefix="/sdapi/v1", tags=["a1111"], responses=errors(ErrorAnswer))


# ---- drawing


@router.post("/txt2img", openapi_extra=described(TextToImage))
async def txt2img(http: HTTPRequest, queue: QueueHere) -> dict[str, Any]:
    """Draw from text and units."""
    values = await json_body(http, queue.settings)
    body = checked(TextToImage, values)
    return await _answer(http, queue, values, body, await _fields(values, body, http, queue))


@router.post("/img2img", openapi_extra=described(ImageToImage))
async def img2img(http: HTTPRequest, queue: QueueHere) -> dict[str, Any]:
    """Draw from a picture, or inside its mask."""
    values = await json_body(http, queue.settings)
    body = checked(ImageToImage, values)
    fields = await _fields(values, body, http, queue)
    source = await keep_encoded(queue, body.init_images[0], "init_images")
    size, framing = (body.width, body.height), looked_up("resize_mode", str(body.resize_mode), FRAMINGS)
    fields |= {"task": "edit", "strength": max(body.denoising_strength, 0.01)}
    fields["image"] = await framed(queue, source, size, framing, "init_images")
    if body.mask:
        content = await asyncio.to_thread(_mask, body, source.id, queue)
        mask = await framed(queue, await keep(queue, content, "mask"), size, framing, "mask")
        fields |= {"task": "inpaint", "mask": mask}
    return await _answer(http, queue, values, body, fields)


async def _fields(
    values: Mapping[str, Any], body: TextToImage, http: HTTPRequest, queue: Queue
) -> dict[str, Any]:
    """A request's fields from theirs. Raises :class:`Problem`."""
    _check_supported(values, body)
    prompt, loras = _without_loras(body.prompt)
    name = str(body.override_settings.get("sd_model_checkpoint") or _chosen_base(http))
    base = await served(name, queue.settings)
    fields: dict[str, Any] = {
        "prompt": prompt,
        "loras": loras,
        "base": name,
        "steps": body.steps,
        "count": body.batch_size * body.n_iter,
        "size": [body.width, body.height],
        "scheduler": _scheduler(body, base),
    }
    if body.seed >= 0:
        fields["seed"] = body.seed
    units = await read_units(body.alwayson_scripts, queue, (body.width, body.height))
    return fields | guidance_fields(body, base) | units


def guidance_fields(body: TextToImage, base: Served) -> dict[str, Any]:
    """Guidance, and the negative prompt where it is read. On FLUX as Forge means it: ``cfg_scale`` is
    classifier-free guidance, off at 1, beside the distilled one."""
    scale = (1.0 if base.distilled else 7.0) if body.cfg_scale is None else body.cfg_scale
    found: dict[str, Any] = {"guidance": scale}
    if base.distilled:
        found = {"guidance": body.distilled_cfg_scale, "true_guidance": scale if scale > 1 else None}
    return found | ({"negative": body.negative_prompt} if scale > 1 else {})


def _check_supported(values: Mapping[str, Any], body: TextToImage) -> None:
    """Raises :class:`Problem` for what would change the picture and has no counterpart."""
    for name, what in _REFUSED.items():
        if values.get(name):
            raise refused(name, f"this server does not offer {what}; leave it out.", "not_supported")
    check_fields(values)
    check_options(body.override_settings)
    for name, script in body.alwayson_scripts.items():
        arguments = script.get("args") or [] if isinstance(script, dict) else None
        if not isinstance(arguments, list):
            raise refused(f"alwayson_scripts.{name[:60]}", "an object with a list 'args' is expected.")
        if name.lower() not in _SCRIPTS and arguments and arguments[0]:
            text = f"'{name[:60]}' is not part of this server; leave it out."
            raise refused("alwayson_scripts", text, "not_supported")


def _without_loras(prompt: str) -> tuple[str, list[dict[str, Any]]]:
    """``<lora:NAME:WEIGHT>`` taken out of a prompt. Raises :class:`Problem`."""
    found = []
    for name, weight in _LORA.findall(prompt):
        try:
            found.append({"path": name, "weight": float(weight or 1)})
        except ValueError as error:
            raise refused("prompt", f"'{weight[:20]}' is no weight; write <lora:NAME:0.8>.") from error
    return _LORA.sub("", prompt).strip(" ,") if found else prompt, found


def _chosen_base(http: HTTPRequest) -> str:
    """The base that this protocol's clients have chosen, else the server's first."""
    return getattr(http.app.state, "a1111_base", http.app.state.settings.base)


def _scheduler(body: TextToImage, base: Served) -> str | None:
    """Our scheduler for their sampler and scheduler. Raises :class:`Problem` for one that is not here."""
    name = body.sampler_name or body.sampler_index
    found = _sampler(name) if name else None
    karras = body.scheduler.lower() == "karras" and found in ("dpm++2m", "dpm++2m-karras")
    simple = body.scheduler.lower() == "simple" and base.flows  # what Forge calls a flow base's own
    if not (karras or simple or body.scheduler.lower() in _ANY_SCHEDULER):
        text = f"'{body.scheduler[:60]}' is not here for this sampler; send 'Automatic'"
        raise refused("scheduler", f"{text}, or 'Karras' with DPM++ 2M.", "not_supported")
    if found == "euler" and base.flows:
        return None
    return "dpm++2m-karras" if karras else _with_eta(found, body.eta)


def _with_eta(scheduler: str | None, eta: float | None) -> str | None:
    """The scheduler whose new noise a step is ``eta`` times its usual share. Raises :class:`Problem`.

    DDIM with an eta of 1 is DDPM (Song et al. 2021, §4.1), and Euler's ancestral steps without noise are
    Euler's. Clients send 1 for every sampler.
    """
    usual = {"ddim": 0.0, "euler-a": 1.0}.get(scheduler or "")
    if eta is None or usual is None or eta == usual:
        return scheduler
    if eta not in (0, 1):
        text = f"{eta:g} is asked; with this sampler send 0 or 1."
        raise refused("eta", text, "not_supported")
    return "ddpm" if scheduler == "ddim" else "euler"


def _sampler(name: str) -> str:
    known = {theirs.lower(): ours for theirs, ours in SAMPLERS.items()}
    found = known.get(name.lower())
    if found is None:
        text = f"'{name[:60]}' is not here; known are {', '.join(SAMPLERS)}."
        raise refused("sampler_name", text, "sampler_not_found", 404)
    return found


def _mask(body: ImageToImage, source: str, queue: Queue) -> bytes:
    """Their mask as ours: white is repainted, blurred as they say, of the picture's size."""
    content = decoded_picture(body.mask, "mask")
    try:
        load_image(content, max_pixels=queue.settings.limits.picture_pixels)
        size = load_image(queue.store.path(source)).size
    except ImpromptError as error:
        raise refused("mask", str(error), "bad_picture") from error
    with Image.open(io.BytesIO(content)) as opened:  # as theirs, the alpha channel where there is one
        alpha = opened.convert("RGBA").getchannel("A")
        mask = (opened.convert("L") if alpha.getextrema() == (255, 255) else alpha).resize(size)
    if body.inpainting_mask_invert:
        mask = ImageOps.invert(mask)
    both = (body.mask_blur_x, body.mask_blur_y) if body.mask_blur is None else (body.mask_blur,) * 2
    if any(both):
        mask = mask.filter(ImageFilter.GaussianBlur([min(64.0, blur) for blur in both]))
    return as_bytes(mask)


async def _answer(
    http: HTTPRequest, queue: Queue, values: Mapping[str, Any], body: TextToImage, fields: dict[str, Any]
) -> dict[str, Any]:
    try:
        job = await drawn(queue, http, await checked_request(queue, fields), previews=True)
    except Problem as problem:
        if problem.field in _THEIR_FIELDS:
            ours, problem.field = problem.field, _THEIR_FIELDS[problem.field]
            problem.message = problem.field + problem.message.removeprefix(ours)
        raise
    files = await contents(queue, job.pictures)
    base = await served(job.request.base, queue.settings)
    large = ("init_images", "mask", "alwayson_scripts")
    return {
        "images": await encoded(files) if body.send_images else [],
        "parameters": {name: value for name, value in values.items() if name not in large},
        "info": json.dumps(_info(job, files, base)),
    }


def _info(job: Job, files: list[bytes], base: Served) -> dict[str, Any]:
    request = job.record or {}
    seeds = [seed_for(request["seed"], index) for index in range(len(files))]
    width, height = request["size"]
    guidance = request["true_guidance"] or 1.0 if base.distilled else request["guidance"]
    return {
        "prompt": request["prompt"], "all_prompts": [request["prompt"]] * len(files),
        "negative_prompt": request["negative"], "all_negative_prompts": [request["negative"]] * len(files),
        "seed": seeds[0], "all_seeds": seeds, "subseed": -1, "all_subseeds": [-1] * len(files),
        "subseed_strength": 0, "width": width, "height": height, "sampler_name": request["scheduler"],
        "cfg_scale": guidance, "steps": request["steps"], "batch_size": len(files),
        "sd_model_name": request["base"], "sd_model_hash": "", "denoising_strength": request["strength"],
        "index_of_first_image": 0, "infotexts": [_parameters(content) for content in files],
        "job_timestamp": str(int(job.created)), "clip_skip": 1, "styles": [],
        "extra_generation_params": {"Distilled CFG Scale": request["guidance"]} if base.distilled else {},
    }  # fmt: skip


def _parameters(content: bytes) -> str:
    """The ``parameters`` text of a PNG, in their form; empty where there is none."""
    with Image.open(io.BytesIO(content)) as image:
        found = image.info.get("parameters", "")
    return found if isinstance(found, str) else ""


@router.post("/png-info", openapi_extra=described(PictureBody))
async def png_info(http: HTTPRequest, queue: QueueHere) -> dict[str, Any]:
    """What a picture says about how it was drawn."""
    body = checked(PictureBody, await json_body(http, queue.settings))
    content = await asyncio.to_thread(decoded_picture, body.image, "image")
    picture = await keep(queue, content, "image")
    record = await asyncio.to_thread(queue.store.record, picture.id)
    items = {} if record is None else {"imprompt": record.to_json()}
    return {"info": await asyncio.to_thread(_parameters, content), "items": items, "parameters": {}}


# ---- state


@router.get("/progress")
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


@router.post("/interrupt")
@router.post("/skip")
async def interrupt(http: HTTPRequest, queue: QueueHere) -> dict[str, Any]:
    """Stop the client's present jobs within a step."""
    for job in queue.unfinished(http.state.client):
        await queue.cancel(job)
    return {}


@router.get("/options")
async def options(http: HTTPRequest) -> dict[str, Any]:
    """The options that this server has."""
    base = _chosen_base(http)
    return {"sd_model_checkpoint": base, "sd_checkpoint_hash": "", "samples_format": "png"}


@router.post("/options", openapi_extra=described(Options))
async def set_options(http: HTTPRequest, queue: QueueHere) -> dict[str, Any]:
    """Choose the base of this protocol's next jobs."""
    values = await json_body(http, queue.settings)
    check_options(values)
    base = checked(Options, values).sd_model_checkpoint
    if base is not None:
        if base not in await asyncio.to_thread(offered_bases, queue.settings):
            text = f"'{base[:80]}' is not here; /sdapi/v1/sd-models lists what is."
            raise refused("sd_model_checkpoint", text, "model_not_found", 404)
        http.app.state.a1111_base = base
    return {}


# ---- lists


@router.get("/samplers")
async def samplers() -> list[dict[str, Any]]:
    """Samplers by their names there."""
    return [{"name": name, "aliases": [ours], "options": {}} for name, ours in SAMPLERS.items()]


@router.get("/schedulers")
async def schedulers() -> list[dict[str, Any]]:
    """Noise schedules."""
    return [
        {"name": name, "label": name.title(), "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name in SCHEDULERS
    ]


@router.get("/sd-models")
def sd_models(http: HTTPRequest) -> list[dict[str, Any]]:  # looks at the disk, and so runs on a thread
    """Bases."""
    return [
        {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
        for name in offered_bases(http.app.state.settings)
    ]


@router.get("/loras")
async def loras(queue: QueueHere) -> list[dict[str, Any]]:
    """LoRAs that prompts may name."""
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in queue.settings.loras]


@router.get("/scripts")
async def scripts() -> dict[str, list[str]]:
    """Scripts that clients look for."""
    names = sorted(_SCRIPTS)
    return {"txt2img": names, "img2img": names}


@router.get("/cmd-flags")
async def cmd_flags() -> dict[str, Any]:
    """Nothing that concerns clients."""
    return {}


@router.get("/embeddings")
async def embeddings() -> dict[str, Any]:
    """Textual inversion is not offered over HTTP."""
    return {"loaded": {}, "skipped": {}}


@router.get("/upscalers")
@router.get("/face-restorers")
@router.get("/hypernetworks")
@router.get("/prompt-styles")
@router.get("/sd-vae")
async def nothing() -> list[Any]:
    """Lists that are empty here."""
    return []


@router.post("/refresh-checkpoints")
@router.post("/refresh-loras")
async def refresh() -> dict[str, Any]:
    """Models are read when the server starts."""
    return {}
