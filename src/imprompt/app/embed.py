"""``imprompt embed``: encode pictures and save their features."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PICTURE", help="the pictures to encode, in this order")
    add("-o", "--output", required=True, metavar="FILE", help=".safetensors file to write")
    add("--overwrite", action="store_true", help="replace a file that holds no saved features")
    add("--encoder", metavar="NAME", help="image encoder: folder, or repository:folder of the hub")
    add(
        "--base",
        metavar="NAME",
        help="encode for this base's default adapter; default: emoji",
    )
    add("--adapter", metavar="NAME", help="encode for this adapter")
    add(
        "--framing", default="crop", help="crop, top, bottom, left, right, pad, squash or tile; default: crop"
    )
    add("--sharpen", type=float, default=0.0, metavar="X", help="how much to sharpen, 0 to 1; default: 0")
    add(
        "--face-model",
        metavar="FOLDER",
        help="face adapters: folder with a face detector and a recogniser (.onnx)",
    )
    add(
        "--face",
        default="largest",
        help="face adapters: largest, or a number from 0 (the largest); default: largest",
    )


def run(args: argparse.Namespace) -> int:
    from imprompt.app.embedding import embed

    print(embed(**vars(args)))
    return 0
