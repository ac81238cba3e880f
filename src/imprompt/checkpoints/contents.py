"""What an adapter's keys, shapes, dtypes and metadata say of it; without torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from imprompt.checkpoints.identify import Identity, identify
from imprompt.checkpoints.layouts import SECTIONS, our_form
from imprompt.checkpoints.structure import FOREIGN, Shape, Structure, either, examine, some
from imprompt.errors import ModelError
from imprompt.tensorfile import DTYPES, read_header

T = TypeVar("T")


@dataclass(frozen=True)
class Contents:
    """Keys, shapes, dtypes and metadata of a file or state dict."""

    file: Path | None
    name: str
    structure: Structure
    shapes: dict[str, dict[str, Shape]]
    """By section."""
    dtypes: dict[str, str]
    """By key, in our form."""
    metadata: dict[str, str]

    @classmethod
    def of_file(cls, path: Path, name: str | None = None) -> "Contents":
        """Read the header of a ``.safetensors`` file. Raises :class:`ModelError`."""
        header, metadata = read_header(path)
        return cls.of_header(header, metadata, name or path.stem, path)

    @classmethod
    def of_header(
        cls,
        header: Mapping[str, tuple[str, Shape]],
        metadata: dict[str, str],
        name: str,
        file: Path | None = None,
    ) -> "Contents":
        """Examine dtypes and shapes by published names; ``file`` is their file, if any."""
        for pattern, what in FOREIGN:
            if any(re.match(pattern, key) for key in header):
                raise ModelError(f"'{name}' is no adapter that can be read here, it is {what}.")
        ours, layout = our_form(header)
        odd = [f"{key} ({dtype})" for key, (dtype, _) in ours.items() if dtype not in DTYPES.values()]
        shapes = by_section({key: shape for key, (_, shape) in ours.items()}, name)
        if odd:
            raise ModelError(
                f"adapter '{name}' has weights that are not {either(tuple(DTYPES.values()))}: {some(odd)}."
            )
        dtypes = {key: dtype for key, (dtype, _) in ours.items()}
        return cls(file, name, examine(shapes, layout, name), shapes, dtypes, metadata)

    def identify(self, variant: str | None, *, hashed: bool = True) -> Identity:
        """See :func:`imprompt.checkpoints.identify.identify`; ``hashed=False`` does not read the whole
        file."""
        file = self.file if hashed else None
        return identify(self.structure, self.name, variant, self.metadata, self.dtypes, file)


def by_section(flat: Mapping[str, T], name: str) -> dict[str, dict[str, T]]:
    """Sort keys by section. Raises :class:`ModelError` for keys of another."""
    sections: dict[str, dict[str, T]] = {section: {} for section in SECTIONS}
    extra = []
    for key, value in flat.items():
        section, _, rest = key.partition(".")
        if section in sections and rest:
            sections[section][rest] = value
        else:
            extra.append(key)
    if extra:
        raise ModelError(
            f"'{name}' is no adapter: beside 'image_proj.…' and 'ip_adapter.…' it has {some(extra)}."
        )
    return sections
