"""Where an adapter's files are: from a name to its weights and the image encoders that may go with them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imprompt import hub
from imprompt.catalog import AdapterRow, EncoderRow, adapters, encoders
from imprompt.catalog.resolve import Source, resolve
from imprompt.errors import ModelError, UsageError

_UNFINISHED = "checkpoint-"
"""Prefix of the files that a training run goes on from; they lie beside the adapter it made."""


NOTED_ENCODER = "imprompt.image_encoder"
"""Metadata of a trained adapter's file: the folder or repository of its image encoder."""


@dataclass(frozen=True)
class EncoderPlace:
    """Where an image encoder may be: a local folder or hub repository, and a folder in it."""

    source: str
    subfolder: str | None = None

    @classmethod
    def named(cls, name: str | Path) -> "EncoderPlace":
        """An alias, a folder, ``owner/name[/folder]`` or ``owner/name:folder``. Raises :class:`ModelError` if
        there is no image encoder."""
        place = cls.of(resolve(name, "image encoder", encoders(), "a folder or a hub id (owner/name/folder)"))
        if not any(place.widths()):
            raise ModelError(
                f"no image encoder (config.json with hidden_size and projection_dim) at '{name}'."
            )
        return place

    @classmethod
    def of(cls, source: Source) -> "EncoderPlace":
        """The place of a resolved name."""
        return cls(source.folder, source.inside or None)

    @classmethod
    def noted(cls, metadata: Mapping[str, str]) -> "tuple[EncoderPlace, ...]":
        """Where the trainer of an adapter file says its encoder is; empty if it says nothing or a folder that
        is not here."""
        name = metadata.get(NOTED_ENCODER, "")
        if os.path.exists(name):  # noqa: PTH110  # also for what is no valid path
            return (cls(name),)
        source, _, subfolder = name.partition(":")
        return (cls(source, subfolder or None),) if source.count("/") == 1 and source[0] not in "./~" else ()

    @property
    def cached(self) -> bool:
        """Whether it is a repository whose encoder is in the hub's cache; the hub is not asked."""
        return hub.cached_file(self.source, self._inside("model.safetensors")) is not None

    def widths(self) -> tuple[int, int]:
        """(pooled, hidden) width by its configuration; zeros when there is none."""
        if os.path.exists(self.source):  # noqa: PTH110  # also for what is no valid path
            source = Source(self.source, Path(self.source))
        else:
            source = Source(self.source, None, self.source)
            known = published_encoders().get(self)
            if known is not None and hub.cached_file(self.source, self._inside("config.json")) is None:
                return known  # the hub need not be asked for what the catalogue says
        try:
            config = source.config(self._inside("config.json"))
        except ModelError:
            if source.path is not None:
                raise
            return 0, 0
        config = config.get("vision_config", config)
        hidden = int(config.get("hidden_size", 0))
        unprojected = hidden if "siglip" in str(config.get("model_type")) else 0
        return int(config.get("projection_dim") or unprojected), hidden

    def _inside(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def __str__(self) -> str:
        return self.source + (f":{self.subfolder}" if self.subfolder else "")


def published_encoders() -> dict[EncoderPlace, tuple[int, int]]:
    """The encoders of the catalogue that are on the hub, with their (pooled, hidden) widths."""
    return {_place_of(row): (row.pooled, row.hidden) for row in encoders().values() if not row.bundled}


def locate(
    name: str, subfolder: str | None = None, weight_name: str | None = None
) -> tuple[Path, tuple[EncoderPlace, ...]]:
    """The adapter's file, fetched if need be, and where its image encoder may be.

    ``name`` is an alias of the catalogue, a file, a folder, or ``owner/name[/folder]/file`` of the hub;
    ``subfolder`` and ``weight_name`` say the file of a folder or repository. Raises :class:`ModelError` when
    there is none or several, or when it is a pickle without a ``.safetensors`` twin; :class:`UsageError` for
    what names a file twice.
    """
    source = resolve(
        name, "adapter", adapters(), "a file, a folder or owner/name/file.safetensors of the hub"
    )
    if isinstance(source.row, AdapterRow) and source.path is None:
        return _published(source, source.row), _places_of(source.row)
    if source.path is not None:
        return _local(source.path, subfolder, weight_name)
    inside = "/".join(part for part in (source.inside, subfolder, weight_name) if part)
    if not inside or (weight_name is None and not source.is_file):
        raise UsageError(
            f"which file of the repository {source.repo}? Give {source.repo}/file.safetensors, or "
            "weight_name=."
        )
    folder = inside.rpartition("/")[0]
    places = [f"{folder}/image_encoder"] if folder else []
    places += [each for each in _encoder_folders() if each not in places]
    found = tuple(EncoderPlace(source.repo, each) for each in places)
    what = f"adapter '{name}'"
    if inside.endswith(".bin"):
        try:
            return hub.fetch(source.repo, inside.removesuffix(".bin") + ".safetensors", what=what), found
        except ModelError:
            pass  # no twin: fetch what was named, and let the reader say what to do with it
    return hub.fetch(source.repo, inside, what=what), found


def _published(source: Source, row: AdapterRow) -> Path:
    file = row.file.rpartition("/")[2]
    if row.pickled:
        raise ModelError(
            f"adapter '{row.name}' is a pickle where it is published ({row.repo}, {row.file}), and drawing "
            f"opens none. Once: imprompt convert {row.name} {Path(file).stem}.safetensors, then --adapter "
            "that file."
        )
    return source.file(what=f"adapter '{row.name}'")


def _places_of(row: AdapterRow) -> tuple[EncoderPlace, ...]:
    return () if row.encoder is None else (_place_of(encoders()[row.encoder]),)


def _place_of(row: EncoderRow) -> EncoderPlace:
    return EncoderPlace(row.repo, row.folder or None)


def _local(
    root: Path, subfolder: str | None, weight_name: str | None
) -> tuple[Path, tuple[EncoderPlace, ...]]:
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
    """The ``.safetensors`` beside a pickled ``.bin``, which holds the same weights and runs no code."""
    twin = path.with_suffix(".safetensors")
    return twin if path.suffix == ".bin" and twin.is_file() else path


def _places_around(folder: Path) -> tuple[EncoderPlace, ...]:
    return tuple(
        EncoderPlace(str(base / inner))
        for base in (folder, folder.parent)
        for inner in _encoder_folders()
        if (base / inner / "config.json").is_file()
    )


def _encoder_folders() -> tuple[str, ...]:
    """The folders in which image encoders are published beside adapters."""
    return tuple(dict.fromkeys(["image_encoder", *(row.folder for row in encoders().values() if row.folder)]))


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*") if path.suffix in {".safetensors", ".bin"})
    return f" (there is {', '.join(names)})" if names else ""
