"""``imprompt convert``: rewrite a pickled adapter, or saved features, as safetensors."""

import argparse

from imprompt.catalog import adapters
from imprompt.errors import UsageError
from imprompt.io import check_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="adapter (.bin, .ckpt or .pt), training checkpoint, .ipadpt file, or alias of an adapter",
    )
    parser.add_argument("target", help="the .safetensors file to write")
    parser.add_argument("--variant", help="the adapter's variant, if its weights do not tell")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that was not converted")


def run(args: argparse.Namespace) -> int:
    from imprompt.checkpoints.convert import check_target, convert

    source = args.source
    if source.lower().endswith(".ipadpt"):
        from imprompt.app.ipadpt import convert_ipadpt

        if args.variant is not None:
            raise UsageError("--variant: has no effect on an .ipadpt file, which holds features.")
        print(convert_ipadpt(source, args.target, overwrite=args.overwrite))
        return 0
    check_target(source, args.target, overwrite=args.overwrite)
    if source in adapters() and not check_path(source, "adapter").exists():
        from imprompt.generation.families import adapter_file

        source = adapter_file(source)
    print(convert(source, args.target, variant=args.variant, overwrite=args.overwrite))
    return 0
