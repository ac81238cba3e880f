"""Convert pickled adapters, and whole training checkpoints, to ``.safetensors``."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from imprompt.checkpoints.checkpoint import check_written, checkpoint_of, contents_of, write
from imprompt.checkpoints.inspect import Inspection, inspect
from imprompt.checkpoints.locate import adapter_in
from imprompt.errors import UsageError
from imprompt.io import check_path, sha256
from imprompt.places import check_place, identities
from imprompt.tensorfile import metadata_of, read_header
from imprompt.weights import load_pickle, load_tensors

_PROCESSOR = re.compile(
    r"unet\.(?P<stage>down_blocks|up_blocks|mid_block)\.(?P<path>.+)\.attn(?P<kind>[12])\.processor\."
    r"(?P<rest>to_[kv]_ip\.weight|to_(q|k|v|out)_lora\.(down|up)\.weight)"
)
_SOURCE = "imprompt.source_sha256"
_PICKLES = (".bin", ".ckpt", ".pt")


def convert(
    source: str | Path, target: str | Path, *, variant: str | None = None, overwrite: bool = False
) -> Inspection:
    """Convert a ``.bin``, ``.ckpt`` or ``.pt``, or a training script's whole-model checkpoint.

    Of a folder, such as a training run's, the adapter in it is taken.
    Only tensors are unpickled, never code. The metadata of a ``.safetensors`` file are kept. The result is
    written whole or not at all, and read back to check it. Raises :class:`ModelError` as
    :func:`~imprompt.checkpoints.checkpoint.read` does, and as :func:`check_target` does.
    """
    source = check_path(source)
    if source.is_dir():
        pickles = [path for path in sorted(source.iterdir()) if path.suffix in _PICKLES]
        safe = any(source.glob("*.safetensors"))
        source = pickles[0] if len(pickles) == 1 and not safe else adapter_in(source)
    target = check_target(source, target, overwrite=overwrite)
    if source.suffix == ".safetensors":
        found, metadata = load_tensors(source), read_header(source)[1]
    else:
        found, metadata = load_pickle(source), {}
    tensors = _trained(found)
    checkpoint = checkpoint_of(contents_of(tensors, source.stem, source, metadata), tensors, variant)
    checkpoint.metadata[_SOURCE] = sha256(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    write(checkpoint, target)
    check_written(target, checkpoint.tensors)
    return inspect(target)


def check_target(source: str | Path, target: str | Path, *, overwrite: bool = False) -> Path:
    """``target``, if an adapter can be written there: converted ones are replaced, other files only with
    ``overwrite``, and ``source`` never. Raises :class:`UsageError` and :class:`InputError`."""
    target = check_path(target)
    if check_path(source).resolve() == target.resolve():
        raise UsageError(f"convert needs another target than the source '{source}'.")
    check_place(
        target,
        overwrite=overwrite,
        is_ours=lambda path: _SOURCE in metadata_of(path),
        reads=identities([source]),
        said="the file that is there was not converted",
    )
    return target


def _trained(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the adapter out of a whole-model checkpoint of the reference training scripts.

    Anything else is returned unchanged. Their UNet shares its modules with ``adapter_modules``, and some ways
    of saving keep shared tensors only under the UNet's names, which are numbered like
    ``unet.attn_processors``.
    """
    named = {key.removeprefix("module."): value for key, value in tensors.items()}
    if not any(key.startswith("image_proj_model.") for key in named):
        return dict(tensors)
    processors = {key: match for key in named if (match := _PROCESSOR.fullmatch(key))}
    # Every attention block has both kinds, so that one of them is enough to count it.
    order = sorted({_block_order(match) for match in processors.values()})
    adapter: dict[str, Tensor] = {}
    for key, match in processors.items():
        number = 2 * order.index(_block_order(match)) + int(match["kind"]) - 1
        adapter[f"ip_adapter.{number}.{match['rest']}"] = named[key]
    for key, value in named.items():
        section, _, rest = key.partition(".")
        if section == "image_proj_model":
            adapter[f"image_proj.{rest}"] = value
        elif section == "adapter_modules":
            adapter[f"ip_adapter.{rest}"] = value
    return adapter


def _block_order(match: re.Match[str]) -> tuple[int, ...]:
    stage = ("down_blocks", "up_blocks", "mid_block").index(match["stage"])
    return stage, *(int(number) for number in re.findall(r"\d+", match["path"]))
