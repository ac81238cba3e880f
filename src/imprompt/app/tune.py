"""``imprompt tune``: find the settings that keep most of a text and of a picture."""

import argparse
import json
import sys

from imprompt.app import drawing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    drawing.add_arguments(parser, "generate")
    parser.add_argument(
        "--prefer",
        type=float,
        default=0.5,
        metavar="X",
        help="0: all for the text, 1: for the picture; default 0.5",
    )


def run(args: argparse.Namespace) -> int:
    request = drawing.read_request("generate", args)
    drawing.refuse_with(args, "goes with a single request; repeat the chosen one with it")

    from imprompt.app.tuning import AXES, tune, usual_axes

    profiled = any("profile=" in text for texts in args.images or () for text in texts)
    axes = args.sweep or (usual_axes(request) if profiled else AXES)  # looks up the base, if it must
    drawing.check_swept("generate", args, axes)
    if args.count is None:
        request = request.replace(count=2)

    with drawing.network(args):
        tuned = tune(
            request,
            args.output or "tune",
            axes=args.sweep or None,
            prefer=args.prefer,
            overwrite=args.overwrite,
            engine=drawing.make_engine(args),
            say=lambda line: print(f"imprompt: {line}", file=sys.stderr),
        )
    files = [str(path) for path in tuned.paths]
    if args.json:
        fidelity = {"text": tuned.fidelity.text, "picture": tuned.fidelity.picture}
        print(json.dumps({"files": files, "chosen": tuned.label, "measure": tuned.measure, **fidelity}))
        return 0
    print("\n".join(files))
    kept = f"{tuned.fidelity.text:.2f} of the text, {tuned.fidelity.picture:.2f} of the picture"
    print(f"imprompt: {tuned.label}: {kept}, by the {tuned.measure}", file=sys.stderr)
    return 0
