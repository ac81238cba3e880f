"""``imprompt embed``: save pictures' features to a file."""

import argparse

HELP = "save pictures' features, to use them later without an encoder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pictures", nargs="+", metavar="PICTURE", help="the pictures to encode, in this order"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="the .safetensors file to write"
    )
    parser.add_argument("--encoder", metavar="NAME", help="an image encoder: a folder, or repo:folder")
    parser.add_argument(
        "--base", default="emoji", metavar="NAME", help="encode for this base's default adapter"
    )
    parser.add_argument("--adapter", metavar="NAME", help="encode for this adapter")
    parser.add_argument(
        "--framing", default="crop", help="crop, top, bottom, left, right, pad, squash or tile"
    )
    parser.add_argument(
        "--sharpen", type=float, default=0.0, metavar="X", help="0 to 1, at the encoder's resolution"
    )
    parser.add_argument(
        "--face-model", metavar="FOLDER", help="face adapters: detector and recogniser (.onnx)"
    )
    parser.add_argument(
        "--face", default="largest", help="face adapters: which face, largest or a number from 0"
    )


def run(args: argparse.Namespace) -> int:
    from imprompt.app.embedding import embed

    path = embed(
        args.pictures,
        args.output,
        encoder=args.encoder,
        base=args.base,
        adapter=args.adapter,
        framing=args.framing,
        sharpen=args.sharpen,
        face_model=args.face_model,
        face=args.face,
    )
    print(path)
    return 0
