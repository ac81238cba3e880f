"""``imprompt embed``: encode pictures and save their features."""

import argparse

HELP = "encode pictures and save their features, to use them later without an encoder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pictures", nargs="+", metavar="PICTURE", help="the pictures to encode, in this order"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=".safetensors file to write")
    parser.add_argument(
        "--encoder", metavar="NAME", help="image encoder: folder, or repository:folder of the hub"
    )
    parser.add_argument(
        "--base",
        default="emoji",
        metavar="NAME",
        help="encode for this base's default adapter; default: emoji",
    )
    parser.add_argument("--adapter", metavar="NAME", help="encode for this adapter")
    parser.add_argument(
        "--framing", default="crop", help="crop, top, bottom, left, right, pad, squash or tile; default: crop"
    )
    parser.add_argument(
        "--sharpen", type=float, default=0.0, metavar="X", help="how much to sharpen, 0 to 1; default: 0"
    )
    parser.add_argument(
        "--face-model",
        metavar="FOLDER",
        help="face adapters: folder with a face detector and a recogniser (.onnx)",
    )
    parser.add_argument(
        "--face",
        default="largest",
        help="face adapters: largest, or a number from 0 (the largest); default: largest",
    )


def run(args: argparse.Namespace) -> int:
    from imprompt.app.embedding import embed

    print(embed(**vars(args)))
    return 0
