"""Find an adapter's file by its name, and the image encoders that may belong to it."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imprompt import hub
from imprompt.catalog import ASSETS, AdapterRow, EncoderRow, adapters, encoders
from imprompt.catalog.resolve import Source, is_here, resolve
from imprompt.errors import ImpromptError, ModelError, UsageError

_UNFINISHED = "checkpoint-"
"""Prefix of a training run's checkpoints, which lie beside the adapter."""


NOTED_ENCODER = "imprompt.image_encoder"
"""Metadata of a trained adapter's file: the folder or repository of its image encoder."""


def encoder_source(name: str | Path) -> Source:
    """Find an image encoder by an alias, a folder, ``owner/name[/folder]`` or ``owner/name:folder``. Raises
    :class:`ModelError` if there is none."""
    source = resolve(name, "image encoder", encoders(), "a folder or a hub id (owner/name/folder)")
    if not any(encoder_widths(source)):
        raise ModelError(f"no image encoder (config.json with hidden_size and projection_dim) at '{name}'.")
    return source


def noted_encoder(metadata: Mapping[str, str]) -> tuple[Source, ...]:
    """The image encoder that the metadata of an adapter file name, if it can be found."""
    try:
        return (resolve(metadata.get(NOTED_ENCODER, ""), "image encoder", encoders()),)
    except ImpromptError:
        return ()


def encoder_note(name: str) -> str:
    """What an adapter's file notes of an image encoder: the catalogue's name of a bundled one, whose folder
    is elsewhere in another installation; other names as they are."""
    bundled = {ASSETS / row.folder: alias for alias, row in encoders().items() if row.bundled}
    return bundled.get(Path(name), name)


def published_encoders(*, here: bool = False) -> tuple[Source, ...]:
    """The encoders of the catalogue that are on the hub; with ``here``, those in the local cache."""
    rows = (row for row in encoders().values() if not row.bundled)
    return tuple(_source_of(row) for row in rows if not here or is_here(row))


def encoder_widths(source: Source) -> tuple[int, int]:
    """(pooled, hidden) width of an image encoder by its ``config.json``, or by the catalogue where that file
    is not on this machine; zeros without either.

    Raises :class:`ModelError` for a damaged local file.
    """
    file = "/".join(part for part in (source.inside, "config.json") if part)
    for row in encoders().values():
        known = (row.repo, row.folder) == (source.repo, source.inside)
        if known and hub.cached_file(source.repo, file) is None:  # what the catalogue says need not be asked
            return row.pooled, row.hidden
    try:
        config = source.config()
    except ModelError:
        if source.path is not None:
            raise
        return 0, 0
    return _stated_widths(config.get("vision_config", config), source)


def _stated_widths(config: Any, source: Source) -> tuple[int, int]:
    try:
        pooled, hidden = (config.get(name) or 0 for name in ("projection_dim", "hidden_size"))
        unprojected = hidden if "siglip" in str(config.get("model_type")) else 0
        return int(pooled or unprojected), int(hidden)
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"the config.json of image encoder '{source}' is damaged: {error}. Get it again."
        ) from error


def locate(
    name: str, subfolder: str | None = None, weight_name: str | None = None
) -> tuple[Path, tuple[Source, ...]]:
    """Find an adapter's file, downloaded if need be, and the places of its image encoder.

    ``name`` is an alias of the catalogue, a file, a folder, or ``owner/name[/folder]/file`` of the hub;
    ``subfolder`` and ``weight_name`` choose a file of a folder or repository. Raises :class:`ModelError` if
    there is no file or several, or only a pickle; :class:`UsageError` if ``weight_name`` is given for a file,
    missing for a repository, or a list.
    """
    for what, value in (("subfolder", subfolder), ("weight_name", weight_name)):
        if not (value is None or isinstance(value, str)):
            raise UsageError(
                f"{what} cannot be a {type(value).__name__}; an adapter is one file. Make an IPAdapter of "
                "each file, and attach them one after the other."
            )
    source = resolve(
        name, "adapter", adapters(), "a file, a folder or owner/name/file.safetensors of the hub"
    )
    if source.path is not None:
        return _local(source.path, subfolder, weight_name)
    if isinstance(source.row, AdapterRow):
        encoder = source.row.encoder
        places = () if encoder is None else (_source_of(encoders()[encoder]),)
        return _published(source, source.row), places
    return _on_hub(source, subfolder, weight_name)


def adapter_in(folder: Path) -> Path:
    """The adapter's file in a folder, such as a training run's. Raises :class:`ModelError` for none or
    several."""
    return _local(folder, None, None)[0]


def _on_hub(
    source: Source, subfolder: str | None, weight_name: str | None
) -> tuple[Path, tuple[Source, ...]]:
    inside = "/".join(part for part in (source.inside, subfolder, weight_name) if part)
    if not inside or (weight_name is None and not source.is_file):
        raise UsageError(
            f"which file of the repository {source.repo}? Give {source.repo}/file.safetensors, or "
            "weight_name=."
        )
    folder = inside.rpartition("/")[0]
    folders = dict.fromkeys([*([f"{folder}/image_encoder"] if folder else []), *_encoder_folders()])
    places = tuple(Source(f"{source.repo}:{each}", None, source.repo, each) for each in folders)
    if inside.endswith(".bin"):
        with contextlib.suppress(ModelError):  # no twin: let the reader say what to do with a pickle
            twin = inside.removesuffix(".bin") + ".safetensors"
            return hub.fetch(source.repo, twin, what=source.title), places
    return hub.fetch(source.repo, inside, what=source.title), places


def _published(source: Source, row: AdapterRow) -> Path:
    file = row.file.rpartition("/")[2]
    if row.pickled:
        raise ModelError(
            f"adapter '{row.name}' is a pickle where it is published ({row.repo}, {row.file}), and drawing "
            f"opens none. Once: imprompt convert {row.name} {Path(file).stem}.safetensors, then --adapter "
            "that file."
        )
    return source.file(what=f"adapter '{row.name}'")


def _source_of(row: EncoderRow) -> Source:
    return Source(row.name, None, row.repo, row.folder, row=row, kind="image encoder")


def _local(root: Path, subfolder: str | None, weight_name: str | None) -> tuple[Path, tuple[Source, ...]]:
    if root.is_file():
        if subfolder or weight_name:
            raise UsageError(f"'{root}' is a file; subfolder and weight_name go with a folder or repository.")
        return _safe_twin(root), _places_around(root.parent)
    folder = root / (subfolder or "")
    if weight_name is not None:
        path = _safe_twin(folder / weight_name)
        if not path.is_file():
            raise ModelError(f"there is no '{weight_name}' in '{folder}'{_listing(folder)}.")
        return path, _places_around(folder)
    files = sorted(folder.glob("*.safetensors"))
    finished = [path for path in files if not path.name.startswith(_UNFINISHED)]
    files = finished or files
    if len(files) != 1:
        raise ModelError(
            f"'{folder}' holds {len(files)} .safetensors files; name the file itself, or say "
            f"weight_name={_listing(folder)}."
        )
    return files[0], _places_around(folder)


def _safe_twin(path: Path) -> Path:
    """The ``.safetensors`` file beside a pickled ``.bin``, if there is one."""
    twin = path.with_suffix(".safetensors")
    return twin if path.suffix == ".bin" and twin.is_file() else path


def _places_around(folder: Path) -> tuple[Source, ...]:
    return tuple(
        Source(str(base / inner), base / inner)
        for base in (folder, folder.parent)
        for inner in _encoder_folders()
        if (base / inner / "config.json").is_file()
    )


def _encoder_folders() -> tuple[str, ...]:
    """Folders in which image encoders are published beside adapters."""
    return tuple(dict.fromkeys(["image_encoder", *(row.folder for row in encoders().values() if row.folder)]))


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*") if path.suffix in {".safetensors", ".bin"})
    return f" (there is {', '.join(names)})" if names else ""
