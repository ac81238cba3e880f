"""Where the server listens, what it offers, and every limit in one place."""

import contextlib
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from imprompt import catalog
from imprompt.errors import InputError, UsageError
from imprompt.io import check_path
from imprompt.schema.request import Request


@dataclass(frozen=True)
class Limits:
    """What one client may ask; every number is checked before work is done for it."""

    queue: int = 64
    """Jobs waiting at once; one more is answered 429."""
    client_share: int = 32
    """Jobs that one client may have waiting."""
    batch: int = 8
    """Jobs drawn together at most."""
    picture_bytes: int = 32 * 2**20
    """Size of one uploaded picture."""
    picture_pixels: int = 64_000_000
    """Width times height of one uploaded picture."""
    json_bytes: int = 2**20
    """Size of a JSON body."""
    body_bytes: int = 96 * 2**20
    """Size of a body with pictures inside, as the OpenAI and A1111 protocols send."""
    json_depth: int = 32
    parts: int = 40
    """Parts of a multipart body."""
    header_seconds: float = 15.0
    body_seconds: float = 60.0
    """How long headers and bodies may take to arrive."""
    side: int = 2048
    """Width or height of a drawn picture."""
    count: int = 16
    steps: int = 200
    frames: int = 128
    stored_bytes: int = 20 * 2**30
    """Size of the picture folder; the oldest unused pictures are deleted beyond it."""
    drain_seconds: float = 60.0
    """How long running jobs may take to finish after SIGTERM."""


@dataclass(frozen=True)
class Settings:
    """Everything ``imprompt serve`` was started with."""

    folder: Path
    """Pictures and journal."""
    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None
    """What clients must send; ``None`` serves everybody on this machine."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names this server is reached by."""
    base: str = "emoji"
    """The model of requests that name none."""
    bases: dict[str, str] = field(default_factory=dict)
    """Further bases: name → folder, file or hub id."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Further adapters: name → file, folder or hub file."""
    loras: dict[str, str] = field(default_factory=dict)
    """Offered LoRAs: name → file."""
    download: bool = False
    """Whether catalogued models that are not on this machine may be downloaded."""
    devices: tuple[str, ...] = ("auto",)
    """One worker process each."""
    dtype: str = "auto"
    offload: str = "none"
    log_prompts: bool = False
    limits: Limits = Limits()

    @property
    def names(self) -> dict[str, dict[str, str]]:
        """What the server's own names stand for, for its workers."""
        return {"bases": self.bases, "adapters": self.adapters, "loras": self.loras}

    @property
    def known_bases(self) -> Mapping[str, object]:
        """By the names under which jobs may ask for them."""
        return {**catalog.bases(), **self.bases}

    @property
    def known_adapters(self) -> Mapping[str, object]:
        """By the names under which jobs may ask for them."""
        return {**catalog.adapters(), **self.adapters}

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        with contextlib.suppress(ValueError):  # a name
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        return self.host == "localhost"

    @property
    def hosts(self) -> frozenset[str] | None:
        """Values of the Host header that are answered, in lower case and without port; ``None``: any, as a
        token is needed."""
        if self.token is not None and not self.loopback:
            return None
        own = ("127.0.0.1", "localhost", "[::1]", self.host, *self.allowed_hosts)
        return frozenset(name.lower() for name in own)

    def check(self) -> None:
        """Raises :class:`UsageError` for an open address without a token, for values out of range, and for a
        base that is not offered."""
        if not self.loopback and self.token is None:
            raise UsageError(
                f"--host {self.host} can be reached from other machines: give a --token (or IMPROMPT_TOKEN) "
                "that clients must send, or leave --host out."
            )
        if self.token is not None:
            _check_token(self.token)
        for device in self.devices:
            fields = {"prompt": "any", "device": device, "dtype": self.dtype, "offload": self.offload}
            try:
                Request.from_mapping(fields)
            except UsageError as error:
                raise UsageError(f"--{error}") from error
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port}: a number from 0 to 65535 is expected.")
        of_flags = {"queue": (self.limits.queue, 0), "batch": (self.limits.batch, 1),
                    "drain": (self.limits.drain_seconds, 0)}  # fmt: skip  # a queue of 0 refuses all jobs
        for name, (given, least) in of_flags.items():
            if not given >= least:  # also NaN
                raise UsageError(f"--{name} {given:g}: {least} or more is expected.")
        self._check_names()
        if self.base not in self.known_bases:
            raise UsageError(
                f"--base '{self.base}' is no alias, and clients know bases by names: give it one with "
                "--model NAME=PATH, and name that as --base."
            )

    def _check_names(self) -> None:
        if self.hosts is None and self.allowed_hosts:
            raise UsageError("--allow-host: with a token any name is answered; leave it out.")
        for name in self.allowed_hosts:
            if "/" in name or ":" in name.rpartition("]")[2]:
                raise UsageError(f"--allow-host '{name}': a name without http:// and port is expected.")


def _check_token(token: str) -> None:
    if len(token) < 8:
        raise UsageError("--token: give at least 8 characters.")
    if not (token.isascii() and token.isprintable()):
        raise UsageError("--token: headers carry ASCII only; give letters, digits and signs of ASCII.")


def data_folder() -> Path:
    """Where pictures and journal are kept unless ``--folder`` says otherwise. Raises :class:`UsageError` for
    a user who has no home."""
    try:
        root = check_path(os.environ.get("XDG_DATA_HOME") or "~/.local/share")
    except InputError as error:
        raise UsageError("--folder: say where to keep pictures and journal, for you have no home.") from error
    return root.absolute() / "imprompt" / "server"
