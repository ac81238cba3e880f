"""``imprompt inspect``: identify an adapter file."""

import argparse
import json

from imprompt.catalog import adapters, bases_for
from imprompt.io import check_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="an adapter: a .safetensors file, an alias, or a run's folder")
    parser.add_argument(
        "--variant", help="the adapter's variant or published file, if its weights do not tell"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from imprompt.checkpoints.inspect import inspect
    from imprompt.checkpoints.locate import locate

    place = check_path(args.file, "adapter")
    named = place.is_dir() or (args.file in adapters() and not place.exists())
    found = inspect(locate(args.file)[0] if named else place, variant=args.variant)
    fits = bases_for(found.base)
    if args.json:
        print(json.dumps(found.to_dict() | {"fits": fits}))
    else:
        print(found)
        print(f"{'fits':<14}{', '.join(fits) or 'no base in the catalogue'}")
    return 0
