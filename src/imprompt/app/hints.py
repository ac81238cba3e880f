"""One-line advice for typing mistakes: a command left out, a flag misspelt or named as elsewhere."""

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from imprompt.errors import UsageError

_ELSEWHERE: Mapping[str, str] = {
    "--batch-size": "--count",
    "--bf16": "--dtype bfloat16",
    "--cfg": "--guidance",
    "--cfg-scale": "--guidance",
    "--checkpoint": "--base",
    "--ckpt": "--base",
    "--controlnet": "--control",
    "--cpu": "--device cpu",
    "--denoise": "--strength",
    "--denoising-strength": "--strength",
    "--guidance-scale": "--guidance",
    "--height": "--size WIDTHxHEIGHT",
    "--init-image": "the picture as the first argument of imprompt edit",
    "--fp16": "--dtype float16",
    "--ip-adapter": "--adapter",
    "--ip-adapter-image": "--image",
    "--ip-adapter-scale": "--scale",
    "--mask-image": "--mask",
    "--model": "--base",
    "--negative-prompt": "--negative",
    "--num-images": "--count",
    "--num-inference-steps": "--steps",
    "--out": "--output",
    "--output-dir": "--output",
    "--prompt": "the text as an argument, without a flag",
    "--reference": "--image",
    "--sampler": "--scheduler",
    "--textual-inversion": "--embedding",
    "--true-cfg": "--true-guidance",
    "--true-cfg-scale": "--true-guidance",
    "--vae": "a diffusers folder with that VAE as --base",
    "--weight": "--scale",
    "--width": "--size WIDTHxHEIGHT",
}
"""Flags of other programs → what imprompt calls them."""
_VERBS: Mapping[str, str] = {
    "draw": "generate",
    "img2img": "edit",
    "img2vid": "animate",
    "inpainting": "inpaint",
    "t2i": "generate",
    "txt2img": "generate",
    "txt2vid": "animate",
    "webui": "serve",
    "xyz": "generate --sweep",
}
"""Commands of other programs → what imprompt calls them."""
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_TASK_OF_FLAG = {"--mask": "inpaint", "--video": "animate", "--frames": "animate", "--strength": "edit"}


def for_flag(flag: str, known: Iterable[str]) -> str:
    """Advice for an unknown flag, or a word too many, or an empty string."""
    known = list(known)
    if _is_picture(flag) and "--image" in known:
        return f"; each picture has a flag of its own: --image {shlex.quote(flag)}"
    if not flag.startswith("-") and "--image" in known:
        return "; a text of several words stands in quotes"
    flag = flag.partition("=")[0].replace("_", "-")
    if flag in _ELSEWHERE and _ELSEWHERE[flag].split()[0] in (*known, "the", "a"):
        return f"; here it is {_ELSEWHERE[flag]}"
    flag = _ELSEWHERE.get(flag, flag)
    if flag in _TASK_OF_FLAG:
        return f"; it belongs to imprompt {_TASK_OF_FLAG[flag]}"
    if "--image" in known and (option := _option_of_pictures(flag)):
        return f"; it is an option of each picture: --image PATH,{option}=…"
    near = difflib.get_close_matches(flag, known, n=1)
    return f"; did you mean {near[0]}" if near else ""


def for_command(name: str, rest: Sequence[str], verbs: Sequence[str]) -> str:
    """The message for a first argument that is not a command: closest match, or that a command is missing."""
    if name in _VERBS:
        return f"no command '{name}'; here it is imprompt {_VERBS[name]}"
    if near := difflib.get_close_matches(name, verbs, n=1):
        return f"no command '{name}'; did you mean '{near[0]}'?"
    words = shlex.join((name, *rest))
    if _is_picture(name):
        return f"a command is missing; write: imprompt edit {words} (or generate --image {shlex.quote(name)})"
    flags = [word for word in (name, *rest) if word.startswith("-") and word not in ("-h", "--help")]
    if " " in name or flags:
        verb = next(filter(None, map(_TASK_OF_FLAG.get, flags)), "generate")
        return f"a command is missing; write: imprompt {verb} {words}"
    return f"no command '{name}'; commands are {', '.join(verbs)}."


def check_is_text(prompt: object) -> None:
    """Raise :class:`UsageError` for a picture's file where a text is expected."""
    if isinstance(prompt, str) and _is_picture(prompt):
        raise UsageError(
            f"'{prompt}' is a picture and stands where the text does; to prompt with it: --image "
            f"{shlex.quote(prompt)}"
        )


def check_is_picture(picture: str, task: str) -> None:
    """Raise :class:`UsageError` for a text where the picture to start from is expected, before any file is
    looked for."""
    if not os.path.splitext(picture)[1] and not os.path.exists(picture):  # noqa: PTH110, PTH122  # any text
        raise UsageError(
            f"there is no file '{picture}'; the picture to start from comes first, then the text: "
            f"imprompt {task} PICTURE {shlex.quote(picture)}"
        )


def check_no_url(where: str, value: object) -> None:
    """Raise :class:`UsageError` for a web address where a file is expected."""
    if isinstance(value, str) and re.match(r"https?://", value, re.IGNORECASE):
        raise UsageError(
            f"{where}: '{value}' is a web address; download it first (curl -LO '{value}') and give the file."
        )


def _option_of_pictures(flag: str) -> str | None:
    from imprompt.schema.prompt import ImagePrompt  # imports pydantic, which help does without

    name = flag.removeprefix("--").replace("-", "_")
    return name if name in ImagePrompt.model_fields else None


def _is_picture(word: str) -> bool:
    """Whether a word is the name of a picture's file that is there."""
    return word.lower().endswith(_PICTURES) and os.path.isfile(word)  # noqa: PTH113  # also no valid path
