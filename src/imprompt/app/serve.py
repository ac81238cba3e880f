"""``imprompt serve``: the page and the HTTP protocols, on this machine only unless a token is given."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from imprompt.errors import ModelError, UsageError
from imprompt.io import check_path

_GPU_NODES = ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")  # CUDA, Jetson, ROCm, WSL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``imprompt serve``."""
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at; others than this machine's need --token")
    add("--port", type=int, default=7860, help="port to listen at; default: 7860")
    add("--token", metavar="TEXT|@FILE", help="token that clients must send; default: IMPROMPT_TOKEN")
    add("--allow-host", action="append", default=[], metavar="NAME", help="another name of this server")
    add("--open", action="store_true", help="open the page in the browser")
    add("--folder", metavar="FOLDER", help="where pictures and journal are kept")
    add("--base", default="emoji", metavar="NAME", help="model of requests that name none; loaded at start")
    add("--model", action="append", default=[], metavar="NAME=PATH", help="offer this base too")
    add("--adapter", action="append", default=[], metavar="NAME=PATH", help="offer this adapter too")
    add("--loras", metavar="FOLDER", help="offer the LoRAs (.safetensors) in this folder")
    add("--download", action="store_true", help="offer models that are not on this machine yet")
    add("--device", action="append", default=[], metavar="NAME", help="one worker each; default: all GPUs")
    add("--dtype", default="auto", help="number format of the weights, as for generate")
    offloads = ("none", "adapter", "model", "sequential")
    add("--offload", default="none", choices=offloads, help="as for generate")
    add("--queue", type=int, default=64, metavar="N", help="how many jobs may wait; default: 64")
    add("--batch", type=int, default=8, metavar="N", help="how many jobs are drawn together; default: 8")
    add("--drain", type=float, default=60.0, metavar="SECONDS", help="for running jobs after SIGTERM")
    add("--log-prompts", action="store_true", help="write prompts to the log")


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted. Raises :class:`UsageError` for flags that do not fit."""
    try:
        from imprompt.app.server.logs import log_to_stderr
        from imprompt.app.server.process import serve
        from imprompt.app.server.settings import Limits, Settings, data_folder
    except ImportError as error:
        raise ModelError(f"serving needs more packages ({error}): pip install 'imprompt[serve]'") from error
    limits = Limits(queue=args.queue, batch=args.batch, drain_seconds=args.drain)
    settings = Settings(
        folder=check_path(args.folder, "--folder").absolute() if args.folder else data_folder(),
        host=args.host,
        port=args.port,
        token=_token(args.token),
        allowed_hosts=tuple(args.allow_host),
        base=args.base,
        bases=_named("--model", args.model),
        adapters=_named("--adapter", args.adapter),
        loras=_loras(args.loras),
        download=args.download,
        devices=tuple(args.device) or _devices(),
        dtype=args.dtype,
        offload=args.offload,
        log_prompts=args.log_prompts,
        limits=limits,
    )
    settings.check()
    log_to_stderr("imprompt.server", "uvicorn.error")
    return serve(settings, open_page=args.open)


def _token(given: str | None) -> str | None:
    if given is None:  # an empty one is refused, not served without
        given = os.environ.get("IMPROMPT_TOKEN") or None
    if given is not None and given.startswith("@"):
        try:
            return check_path(given[1:], "--token").read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UsageError(f"--token {given}: the file cannot be read ({error.strerror}).") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"--token {given}: the file holds no text.") from error
    return given


def _named(flag: str, pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not (name and sign and value):
            raise UsageError(f"{flag} '{pair}': NAME=PATH is expected.")
        if name in found:
            raise UsageError(f"{flag} '{pair}': the name is given twice; name one otherwise.")
        found[name] = value
    return found


def _loras(given: str | None) -> dict[str, str]:
    if given is None:
        return {}
    folder = check_path(given, "--loras")
    if not folder.is_dir():
        raise UsageError(f"--loras: there is no folder '{given}'.")
    found = {path.stem: str(path) for path in sorted(folder.glob("*.safetensors"))}
    if not found:
        raise UsageError(f"--loras '{given}': there is no .safetensors file in it.")
    return found


def _devices() -> tuple[str, ...]:
    """All GPUs, else whatever there is. Asked in a process of its own: the server's never loads torch."""
    if sys.platform == "linux" and not any(Path(node).exists() for node in _GPU_NODES):
        return ("auto",)
    count = "import torch; print(torch.cuda.device_count())"
    asked = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=False)
    if asked.returncode:
        said = asked.stderr.strip().rpartition("\n")[2]
        raise ModelError(f"torch cannot count the GPUs ({said}); say --device, or mend torch.")
    return tuple(f"cuda:{number}" for number in range(int(asked.stdout))) or ("auto",)
