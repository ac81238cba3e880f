"""Adapter files: read with every check, and written.

In: a ``.safetensors`` file or a state dict in a published layout. Out: a :class:`Checkpoint` in one form for
all layouts, or one :class:`ModelError` that names the file, what is wrong and what to do. What exists is in
the catalogue, how it is named in :mod:`imprompt.checkpoints.layouts`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from imprompt.catalog import AdapterRow, families, licences
from imprompt.catalog.variants import Variant
from imprompt.checkpoints.contents import Contents, by_section
from imprompt.checkpoints.identify import NOTED_PUBLISHED, NOTED_VARIANT
from imprompt.checkpoints.layouts import our_form, published_form
from imprompt.checkpoints.structure import LORA, Structure, either, some
from imprompt.errors import ModelError, UsageError
from imprompt.io import check_path
from imprompt.weights import dtype_name, flatten, load_tensors, not_finite, save_tensors

StateDict: TypeAlias = dict[str, dict[str, Tensor]]
"""``{"image_proj": {...}, "ip_adapter": {...}}``."""

_STATE_DICT = "the adapter's state dict"


@dataclass(frozen=True)
class Checkpoint(Structure):
    """An adapter's weights, and what they are. All shapes have been checked."""

    state: StateDict
    """Weights without the LoRA: ``image_proj`` under its published names, ``ip_adapter`` as
    ``N.to_k_ip.weight`` and so on for attention site ``N``, for all layouts."""
    variant: Variant
    name: str
    source: str | None = None
    """Path of its file."""
    published: AdapterRow | None = None
    """The published file, if it is one."""
    lora: dict[str, Tensor] = field(default_factory=dict)
    """FaceID's LoRA, ``N.to_{q,k,v,out}_lora.{down,up}.weight`` for every attention ``N``; else empty."""
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """Base family by its name in the catalogue, or ``other``."""
        return self.family

    @property
    def base_title(self) -> str:
        """The base family's name in messages; empty for ``other``."""
        return families()[self.base].title if self.base in families() else ""

    @property
    def licence(self) -> str:
        """The licence of published adapters of this kind, if it is not free; else empty."""
        if self.variant.reads_faces and self.base != "other":
            return licences.FACES
        return licences.KOLORS if self.base == "kolors" else ""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All weights by their names in our form, the LoRA's among those of ``ip_adapter``."""
        sections = self.state | {"ip_adapter": self.state["ip_adapter"] | self.lora}
        return {f"{part}.{key}": value for part, values in sections.items() for key, value in values.items()}

    def site(self, number: int) -> dict[str, Tensor]:
        """The weights of one attention site by name: ``to_k_ip.weight``, ``to_v_ip.weight``, and others of
        its layout (``to_k_ip.bias``, ``norm_ip.linear.weight``, …)."""
        prefix = f"{number}."
        return {
            key.removeprefix(prefix): value
            for key, value in self.state["ip_adapter"].items()
            if key.startswith(prefix)
        }


def read(
    source: str | Path | Mapping[str, object], *, variant: str | None = None, name: str | None = None
) -> Checkpoint:
    """Read an adapter from a ``.safetensors`` file, or a state dict, nested or flat.

    The variant is ``variant`` (a name of :data:`VARIANTS`, or of a published file), else told by the file's
    SHA-256, metadata, keys and shapes, dtypes, and name. Tensors of a state dict are not copied. Raises
    :class:`ModelError` for a file that is missing, damaged, not finite or no adapter, and if two variants
    remain.
    """
    if isinstance(source, Mapping):
        tensors = flatten(source, _STATE_DICT)
        return checkpoint_of(contents_of(tensors, name or "adapter"), tensors, variant)
    file = check_path(source, "adapter")
    return checkpoint_of(Contents.of_file(file, name), load_tensors(file), variant)


def contents_of(
    tensors: Mapping[str, Tensor],
    name: str,
    file: Path | None = None,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Contents:
    """Examine tensors with their published names; ``file`` is their file, if any, and ``metadata`` what it
    says. Raises :class:`ModelError`."""
    header = {key: (dtype_name(tensor.dtype), tuple(tensor.shape)) for key, tensor in tensors.items()}
    return Contents.of_header(header, dict(metadata), name, file)


def checkpoint_of(contents: Contents, published: Mapping[str, Tensor], variant: str | None) -> Checkpoint:
    """The checkpoint of tensors with their published names. Raises as :func:`read`."""
    name, structure, identity = contents.name, contents.structure, contents.identify(variant)
    if len(identity.variants) > 1:
        raise ModelError(
            f"adapter '{name}' may be {either(v.name for v in identity.variants)}; the file does not tell. "
            f"They differ: {'; '.join(f'{v.name}: {v.about}' for v in identity.variants)}. Say variant=."
        )
    tensors, _ = our_form(published)
    if bad := [key for key, tensor in tensors.items() if not_finite(tensor)]:
        raise ModelError(f"adapter '{name}' has NaN or infinite weights in {some(bad)}. Get the file again.")
    state = by_section(tensors, name)
    lora = {key: state["ip_adapter"].pop(key) for key in list(state["ip_adapter"]) if LORA.fullmatch(key)}
    return Checkpoint(
        **vars(structure),
        state=state,
        variant=identity.variants[0],
        name=name,
        source=str(contents.file) if contents.file else None,
        published=identity.published[0] if len(identity.published) == 1 else None,
        lora=lora,
        metadata=contents.metadata,
    )


def write(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write a ``.safetensors`` file with the published names, and the variant in its metadata.

    It is written whole or not at all. Raises :class:`ModelError` for weights that are not finite, and if it
    cannot be written.
    """
    path = check_path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"adapters are written as .safetensors, not '{path.name}'.")
    tensors = checkpoint.tensors
    if bad := [key for key, tensor in tensors.items() if not_finite(tensor)]:
        raise ModelError(
            f"adapter '{checkpoint.name}' has NaN or infinite weights in {some(bad)}; not saved."
        )
    names = published_form(tensors, checkpoint.layout)
    metadata = checkpoint.metadata | {"format": "pt", NOTED_VARIANT: checkpoint.variant.name}
    if checkpoint.published is not None:
        metadata[NOTED_PUBLISHED] = checkpoint.published.published
    save_tensors({names[key]: value for key, value in tensors.items()}, metadata, path)


def check_written(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Raise :class:`ModelError` unless an adapter's file holds exactly these :attr:`Checkpoint.tensors`."""
    found = read(path).tensors
    for key, value in expected.items():
        if key not in found or not torch.equal(found[key], value):
            raise ModelError(f"'{path}' does not read back as written: '{key}' differs. Write it again.")
