"""The routes of stable-diffusion-webui's ControlNet extension: its lists, and maps of pictures."""

from collections.abc import Sequence
from typing import Any, get_args

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from pydantic import Field

from imprompt import catalog
from imprompt.app.server.a1111 import ErrorAnswer
from imprompt.app.server.a1111_units import MODULES, NOT_HERE, Unit, check_preprocessor, looked_up
from imprompt.app.server.bodies import Body, checked, described, json_body
from imprompt.app.server.capabilities import capabilities
from imprompt.app.server.maps import MapKind, drawn_map
from imprompt.app.server.problems import refused
from imprompt.app.server.protocols import QueueHere, encoded, errors, keep_encoded
from imprompt.app.server.settings import Settings

_AUTO = "ip-adapter-auto"
_TYPES = {
    "Canny": "canny", "Depth": "depth", "Lineart": "lineart", "OpenPose": "pose", "Scribble": "scribble",
    "Segmentation": "seg", "Tile": "tile",
}  # fmt: skip
"""Their kinds of control → ours."""
_PREFERRED = ("openpose_full", "lineart_standard")
"""Preprocessors that a type offers first; of the others, the first of :data:`MODULES`."""

router = APIRouter(prefix="/controlnet", tags=["a1111"], responses=errors(ErrorAnswer))


class DetectBody(Body):
    """Pictures in base64, and the preprocessor whose maps are asked for."""

    controlnet_module: str = "none"
    controlnet_input_images: list[Any] = Field(min_length=1, max_length=8)
    controlnet_processor_res: float = -1
    controlnet_threshold_a: float = -1
    controlnet_threshold_b: float = -1
    controlnet_masks: list[Any] = Field(default_factory=list)


@router.get("/version")
async def version() -> dict[str, int]:
    """Version of the extension's API."""
    return {"version": 3}


@router.get("/model_list")
def model_list(http: HTTPRequest) -> dict[str, list[str]]:
    """Adapters and controls."""
    adapters, controls = _models(http.app.state.settings)
    return {"model_list": ["None", *adapters, *controls]}


@router.get("/module_list")
async def module_list() -> dict[str, list[str]]:
    """Preprocessors."""
    return {"module_list": [_AUTO, *MODULES]}


@router.get("/control_types")
def control_types(http: HTTPRequest) -> dict[str, dict[str, Any]]:
    """Preprocessors and models by kind. The model ``None`` is the base's default of the kind."""
    adapters, controls = _models(http.app.state.settings)
    known = catalog.controls()
    types = {"All": _type([_AUTO, *MODULES], [*adapters, *controls], "none")}
    for title, kind in _TYPES.items():
        modules = [name for name, ours in MODULES.items() if ours == kind]
        preferred = next((name for name in modules if name in _PREFERRED), modules[0])
        models = [name for name in controls if kind in known[name].modes]
        types[title] = _type(["none", *modules], models, preferred)
    types["IP-Adapter"] = _type([_AUTO], adapters, _AUTO)
    return {"control_types": types}


@router.post("/detect", openapi_extra=described(DetectBody))
async def detect(http: HTTPRequest, queue: QueueHere) -> dict[str, Any]:
    """The maps that a preprocessor makes of pictures. Those that need a model are made in a drawing only."""
    body = checked(DetectBody, await json_body(http, queue.settings))
    kind: Any = looked_up("controlnet_module", body.controlnet_module, MODULES)
    if kind not in get_args(MapKind):
        text = f"'{body.controlnet_module[:60]}' needs a model; name it in a unit of a drawing."
        raise refused("controlnet_module", text, "not_supported")
    if body.controlnet_masks:
        raise refused("controlnet_masks", f"masks of maps {NOT_HERE}", "not_supported")
    asked = Unit(
        module=body.controlnet_module, processor_res=body.controlnet_processor_res,
        threshold_a=body.controlnet_threshold_a, threshold_b=body.controlnet_threshold_b,
    )  # fmt: skip
    check_preprocessor(asked, "controlnet_")
    maps = []
    for value in body.controlnet_input_images:
        picture = await keep_encoded(queue, value, "controlnet_input_images")
        maps.append(await queue.decode(drawn_map, kind, queue.store.path(picture.id)))
    return {"images": await encoded(maps), "info": "Success"}


def _models(settings: Settings) -> tuple[list[str], list[str]]:
    """The adapters and the controls that units may name."""
    offered = capabilities(settings)
    adapters, controls = (
        [row["name"] for row in offered[kind] if row["offered"]] for kind in ("adapters", "controls")
    )
    return adapters, controls


def _type(modules: Sequence[str], models: Sequence[str], preferred: str) -> dict[str, Any]:
    return {
        "module_list": list(modules), "model_list": ["None", *models], "default_option": preferred,
        "default_model": "None",
    }  # fmt: skip
