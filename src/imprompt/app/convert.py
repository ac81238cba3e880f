"""``imprompt convert``: rewrite a pickled adapter, or saved features, as safetensors."""

import argparse

from imprompt.catalog import adapters
from imprompt.errors import UsageError
from imprompt.io import check_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="adapter (.bin, .ckpt or .pt), training checkpoint, folder of a training run, .ipadpt file, or "
        "alias of an adapter",
    )
    parser.add_argument("target", nargs="?", help="the .safetensors file to write")
    parser.add_argument("-o", "--output", metavar="FILE", help="another way to say target")
    parser.add_argument("--variant", help="the adapter's variant, if its weights do not tell")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that was not converted")


def run(args: argparse.Namespace) -> int:
    from imprompt.checkpoints.convert import check_target, convert

    if (args.target is None) == (args.output is None):
        given = "no file to write is named" if args.target is None else "two files to write are named"
        raise UsageError(f"convert: {given}; say imprompt convert {args.source} NAME.safetensors.")
    source, target = args.source, args.output if args.target is None else args.target
    if source.lower().endswith(".ipadpt"):
        from imprompt.app.ipadpt import convert_ipadpt

        if args.variant is not None:
            raise UsageError("--variant: has no effect on an .ipadpt file, which holds features.")
        print(convert_ipadpt(source, target, overwrite=args.overwrite))
        return 0
    check_target(source, target, overwrite=args.overwrite)
    if source in adapters() and not check_path(source, "adapter").exists():
        from imprompt.generation.families import adapter_file

        source = adapter_file(source)
    print(convert(source, target, variant=args.variant, overwrite=args.overwrite))
    return 0
