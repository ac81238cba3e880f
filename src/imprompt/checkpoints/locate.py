"""Where an adapter's files are: a path, a folder or a hub repository → the weights' file and its image
encoder.

The hub is asked only for the files that are named or needed, through huggingface_hub and its cache, which
honours ``HF_HUB_OFFLINE``. Nothing is loaded here.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from imprompt.errors import ModelError, UsageError, first_line

_ENCODER_FOLDERS = (
    "image_encoder",
    "models/image_encoder",
    "sdxl_models/image_encoder",
    "clip-vit-large-patch14-336",  # Kolors' FaceID-Plus
)
_UNFINISHED = "checkpoint-"
"""How the files begin that a training run goes on from; they lie beside the adapter it made."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class EncoderPlace:
    """Where an image encoder may lie: a local folder or hub repository, and a folder in it."""

    source: str
    subfolder: str | None = None

    @classmethod
    def named(cls, name: str | Path) -> "EncoderPlace":
        """``folder``, ``owner/name`` or ``owner/name:subfolder``. Raises :class:`ModelError` if nothing is
        there."""
        source, _, subfolder = (str(name), "", "") if Path(name).exists() else str(name).partition(":")
        place = cls(source, subfolder or None)
        if not any(place.widths()):
            raise ModelError(
                f"no image encoder (config.json with hidden_size and projection_dim) at '{name}'."
            )
        return place

    @property
    def cached(self) -> bool:
        """Whether it is a repository whose encoder is in the hub's cache already; the hub is not asked."""
        from huggingface_hub import try_to_load_from_cache

        inside = f"{self.subfolder}/" if self.subfolder else ""
        return any(
            isinstance(try_to_load_from_cache(self.source, f"{inside}{weights}"), str)
            for weights in ("model.safetensors", "pytorch_model.bin")
        )

    def widths(self) -> tuple[int, int]:
        """(pooled, hidden) width from its configuration alone; zeros when there is none."""
        path = Path(self.source, self.subfolder or "", "config.json")
        if not Path(self.source).exists():
            try:
                path = _download(self.source, self.subfolder, "config.json")
            except ModelError:
                return 0, 0
        if not path.is_file():
            return 0, 0
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("vision_config", config)
        return int(config.get("projection_dim", 0)), int(config.get("hidden_size", 0))

    def __str__(self) -> str:
        return self.source + (f":{self.subfolder}" if self.subfolder else "")


PUBLISHED_ENCODERS = {
    EncoderPlace("h94/IP-Adapter", "models/image_encoder"): (1024, 1280),
    EncoderPlace("h94/IP-Adapter", "sdxl_models/image_encoder"): (1280, 1664),
    EncoderPlace("Kwai-Kolors/Kolors-IP-Adapter-Plus", "image_encoder"): (768, 1024),
}
"""ViT-H/14, ViT-bigG/14 and ViT-L/14 at 336, which many published adapters share → (pooled, hidden) width."""


def locate(
    source: str, subfolder: str | None, weight_name: str | None
) -> tuple[Path, tuple[EncoderPlace, ...]]:
    """The weights' file, and where its image encoder may be.

    Raises :class:`ModelError` when there is none or several, :class:`UsageError` for what names a file twice.
    """
    root = Path(source)
    if root.is_file():
        if subfolder or weight_name:
            raise UsageError(
                f"'{source}' is a file; subfolder and weight_name go with a folder or repository."
            )
        return _safe_twin(root), _places_around(root.parent)
    if root.is_dir():
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
    if not _HUB_ID.fullmatch(source):
        raise ModelError(f"'{source}' is no file, no folder and no hub repository (owner/name).")
    if weight_name is None:
        raise UsageError(f"which file of the repository {source}? Say weight_name= (and subfolder=).")
    places = [f"{subfolder}/image_encoder"] if subfolder else []
    places += [folder for folder in _ENCODER_FOLDERS if folder not in places]
    found = tuple(EncoderPlace(source, folder) for folder in places)
    if weight_name.endswith(".bin"):
        try:
            return _download(source, subfolder, weight_name.removesuffix(".bin") + ".safetensors"), found
        except ModelError:
            pass  # no twin: fetch what was named, and let the reader say what to do with it
    return _download(source, subfolder, weight_name), found


def _safe_twin(path: Path) -> Path:
    """The ``.safetensors`` beside a pickled ``.bin``, which holds the same weights and runs no code."""
    twin = path.with_suffix(".safetensors")
    return twin if path.suffix == ".bin" and twin.is_file() else path


def _places_around(folder: Path) -> tuple[EncoderPlace, ...]:
    return tuple(
        EncoderPlace(str(base / inner))
        for base in (folder, folder.parent)
        for inner in _ENCODER_FOLDERS
        if (base / inner / "config.json").is_file()
    )


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*") if path.suffix in {".safetensors", ".bin"})
    return f" (there is {', '.join(names)})" if names else ""


def _download(repo: str, subfolder: str | None, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(repo, name, subfolder=subfolder))
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        where = f"{subfolder}/{name}" if subfolder else name
        reason = first_line(error)
        raise ModelError(f"cannot get '{where}' of {repo} from the hub or its cache: {reason}") from error
