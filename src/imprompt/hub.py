"""Files of the Hugging Face hub: from the cache if they are there, else downloaded, with time-outs.

A failed download is one :class:`ModelError` of one line that ends with the command that downloads the file.
Nothing is asked for under ``HF_HUB_OFFLINE``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from imprompt.errors import ModelError, first_line

TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""


@contextmanager
def offline() -> Iterator[None]:
    """Ask the hub for nothing inside this block, as under ``HF_HUB_OFFLINE``."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def cached_file(repo: str, file: str, revision: str | None = None) -> Path | None:
    """A repository's file in the cache on this machine, if it is there; the hub is not asked."""
    found = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def cached_weights(repo: str, folder: str = "", revision: str | None = None) -> list[Path]:
    """The ``.safetensors`` files of a repository, or of one of its folders, that are in the cache."""
    try:
        root = Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return []
    return sorted((root / folder).rglob("*.safetensors"))


def fetch(repo: str, file: str, *, revision: str | None = None, what: str = "", about: str = "") -> Path:
    """A repository's file, from the cache or the hub.

    ``what`` names the thing it is for in the message, ``about`` adds facts such as size and licence. Raises
    :class:`ModelError` when it is neither here nor to be had.
    """
    if (path := cached_file(repo, file, revision)) is not None:
        return path
    try:
        if not constants.HF_HUB_OFFLINE:
            # One short attempt: a hub that does not answer is not asked six times.
            url = huggingface_hub.hf_hub_url(repo, file, revision=revision)
            huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT)
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision, etag_timeout=TIMEOUT))
    except Exception as error:  # OSError, ValueError, and whatever its HTTP client raises
        raise failure(what or f"'{file}'", repo, error, file=file, about=about) from error


def fetch_folder(repo: str, patterns: list[str], *, what: str) -> Path:
    """The folder of a repository's files that match. Raises :class:`ModelError`."""
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns, etag_timeout=TIMEOUT))
    except Exception as error:
        raise failure(what, repo, error) from error


def failure(what: str, repo: str, error: Exception, *, file: str = "", about: str = "") -> ModelError:
    """The error to raise when something of a repository cannot be had."""
    facts = f"{repo}: {about}" if about else repo
    return ModelError(
        f"{what} ({facts}) {_reason(error, repo)} Download it with: hf download {repo} {file}".strip()
    )


def _reason(error: Exception, repo: str) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"is gated: accept its licence at https://huggingface.co/{repo} and log in (hf auth login)."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "is not on the hub, or is private."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "is not on the hub: the repository has no such file."
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "is not on this machine, and the hub cannot be asked (offline, or HF_HUB_OFFLINE is set)."
    said = first_line(error).rstrip(".") or type(error).__name__
    return f"cannot be downloaded from the hub: {said}."
