"""The drawing commands (generate, edit, inpaint, animate): from flags to a request, files and a summary."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imprompt import output
from imprompt.app.flags import add_request_flags, describe_options
from imprompt.app.hints import check_is_picture, check_is_text, check_no_url
from imprompt.errors import ModelError, UsageError
from imprompt.hub import offline
from imprompt.io import check_path, read_json
from imprompt.output.clips import check_fps
from imprompt.output.record import home_of
from imprompt.schema.prompt import ImagePrompt, TextRegion
from imprompt.schema.request import ControlRef, EmbeddingRef, LoraRef, Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from imprompt.generation.engine import Engine, Result


_WEIGHT = {
    "weight": "share of attention among the pictures of a prompt (--also) with combine=concat, else factor "
    "of the features; default: 1"
}
"""The picture's own of ``weights``."""
_NEEDED = ("prompt", "image", "mask", "video", "text", "path", "kind")
"""Fields that a request or a record may be nothing without, also where they are swept."""
_START = {"edit": "the picture to start from", "inpaint": "the picture to redraw in part"}


def add_arguments(parser: argparse.ArgumentParser, task: str) -> None:
    """Add the arguments of a drawing command: texts and pictures, the request's fields, then output."""
    add = parser.add_argument
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the epilog's lines
    parser.epilog = "\n\n".join(
        [
            describe_options("--image", ImagePrompt, ("image", "features", "tokens", "weights"), _WEIGHT),
            describe_options("--region", TextRegion, ("text",)),
            describe_options("--control", ControlRef, ("kind", "path")),
        ]
    )
    if task in _START:
        add("picture", nargs="?", metavar="PICTURE", help=_START[task])
    optional = "--image or --video" if task == "animate" else "--image"
    add("prompt", nargs="?", help=f"what to draw; optional with {optional}")
    add_request_flags(parser, Request, task)
    add("--save-control", action="store_true", help="also write the map that each control followed")
    add(
        "--sweep",
        action="append",
        metavar="FIELD=VALUE,…",
        help="draw with each value of a field, such as scale=0.3,0.6, profile=linear,style or "
        "image2.scale=0.5,1, and put all on one page; repeat it to draw all combinations",
    )
    add(
        "--from",
        dest="again",
        metavar="PICTURE",
        help="draw the request inside a picture or a .json file again; other flags change it",
    )
    add(
        "--force",
        action="store_true",
        help="with --from: draw even if files or a model's weights have changed",
    )
    add("--trust", action="store_true", help="with --from: download models that it names")
    add(
        "-o",
        "--output",
        metavar="PATH",
        help="file to write, .png, .jpg or .webp, for a clip .gif, .webp or .mp4; or a folder; default: an "
        "unused name in the current folder",
    )
    add("--overwrite", action="store_true", help="replace a file that imprompt did not make")
    add(
        "--explain",
        action="store_true",
        help="also draw where, when and in which layers each image prompt acted",
    )
    add("--json", action="store_true", help="print files, request and timings as JSON")
    add("-q", "--quiet", action="store_true", help="no progress bar")


def draw(task: str, args: argparse.Namespace) -> int:
    """Run a drawing command: read the request, draw, write the files, print their names."""
    request = read_request(task, args)
    if args.save_control and not request.controls:
        raise UsageError("--save-control: there is no control to save; give one with --control.")
    if args.sweep:
        return _sweep(task, args, request)
    target, numbered = target_path(args.output, task, request)
    output.check_target(
        target, request, overwrite=args.overwrite, numbered=numbered, maps=args.save_control,
        pages=_explained(request) if args.explain else (),
    )  # fmt: skip
    _check_gif_pace(target, request)

    with network(args):
        result = make_engine(args).run(request, explain=args.explain)
    pages: dict[str, Image] = {}
    if args.explain:
        from imprompt.app.explain import explain

        for which, found, image in zip(
            _which(result.request), result.attributions, result.images, strict=True
        ):
            pages |= {which + name: page for name, page in explain(found, image).items()}
    paths = output.save(
        result, target, overwrite=args.overwrite, numbered=numbered, maps=args.save_control, pages=pages
    )
    print_notes([result])
    if args.json:
        print(json.dumps(to_dict(result, paths)))
    else:
        print("\n".join(map(str, paths)))
        _print_summary(result)
    return 0


def _which(request: Request) -> list[str]:
    """What the names of the pages about each picture begin with."""
    return [f"{number}-" for number in range(1, request.count + 1)] if request.count > 1 else [""]


def _explained(request: Request) -> list[str]:
    """The names of the pages that ``--explain`` may add."""
    prompts = range(1, len(request.images) + 1)
    return [f"{which}{page}-{n}" for which in _which(request) for page in ("where", "when") for n in prompts]


def read_request(task: str, args: argparse.Namespace) -> Request:
    """The request that the flags describe, or ``--from``'s with their changes. Raises :class:`UsageError`."""
    stated = _stated(task, args)
    if args.again is None:
        if args.force or args.trust:
            raise UsageError("--force and --trust have no effect without --from.")
        return Request.from_mapping({"task": task, **stated})
    before = _earlier_request(args.again)
    if before.task != task:
        raise UsageError(
            f"'{args.again}' was made with 'imprompt {before.task}': repeat it with 'imprompt {before.task} "
            f"--from {args.again}'."
        )
    if args.force or stated.keys() & {"images", "regions", "controls", "image", "mask", "video"}:
        stated["hashes"] = {}
    if args.force:
        stated["fingerprints"] = {}
    request = before.replace(**stated)
    if files := output.Record(request).local_files():
        print(f"imprompt: --from reads {', '.join(files)}", file=sys.stderr)
    return request


def _stated(task: str, args: argparse.Namespace) -> dict[str, Any]:
    """The fields that the flags state, with repeatable flags read into records."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "picture" in given:
        given["image"] = given["picture"]
        if "prompt" not in given:
            check_is_picture(given["picture"], task)
    stated = {name: value for name, value in given.items() if name in Request.model_fields}
    if str(stated.get("seed")).startswith("-"):
        raise UsageError(f"--seed {args.seed}: leave --seed out for a random one; the picture records it.")
    readers: dict[str, Callable[[Any], object]] = {
        "images": lambda texts: ImagePrompt.parse(texts[0], also=texts[1:]),
        "regions": TextRegion.parse,
        "controls": ControlRef.parse,
        "loras": LoraRef.parse,
        "embeddings": EmbeddingRef.parse,
    }
    for name, value in stated.items():
        if name in readers:
            stated[name] = tuple(readers[name](text) for text in value)
    _check_no_urls(stated)
    check_is_text(stated.get("prompt"))
    return stated


def _check_no_urls(stated: Mapping[str, Any]) -> None:
    for name in ("image", "mask", "video", "base", "adapter"):
        check_no_url(name if name == "image" else f"--{name}", stated.get(name))
    for prompt in stated.get("images", ()):
        for path in prompt.paths:
            check_no_url("--image", path)


def _earlier_request(source: str) -> Request:
    if not source.endswith(".json"):
        return output.read_request(source)
    place = check_path(source, "--from")
    values = read_json(place, "--from")
    if "imprompt" not in values:
        return Request.from_mapping(values)
    try:
        return output.Record.from_mapping(values, home_of(place)).request
    except UsageError as error:
        raise UsageError(f"'{source}': {error}") from error


@contextmanager
def network(args: argparse.Namespace) -> Iterator[None]:
    """Allow no downloads for a request from a picture (``--from``), unless ``--trust`` is given."""
    if args.again is None or args.trust:
        yield
        return
    try:
        with offline():
            yield
    except ModelError as error:
        if "HF_HUB_OFFLINE" not in str(error):
            raise
        raise ModelError(
            f"'{args.again}' names a model that is not on this machine; --trust downloads it. ({error})"
        ) from error


def make_engine(args: argparse.Namespace) -> "Engine":
    """An engine with a progress bar, unless ``--quiet`` or nobody looks at a terminal."""
    from imprompt.generation.engine import Engine

    return Engine(quiet=args.quiet or not sys.stderr.isatty())


def target_path(given: str | None, task: str, request: Request) -> tuple[Path, bool]:
    """The file or folder to write to, and whether its name is chosen here: ``-o``, or an unused name in it,
    or an unused name in the current folder."""
    suffix = ".gif" if task == "animate" else ".png"
    if given is None:
        return output.free_name(Path(), task, request.count, suffix), True
    path = check_path(given, "--output")
    if not (task == "animate" and output.our_frames(path)) and (given.endswith(("/", "\\")) or path.is_dir()):
        return output.free_name(path, task, request.count, suffix), True
    return path, False


def to_dict(result: "Result", paths: Sequence[Path]) -> dict[str, object]:
    """What ``--json`` prints of one result."""
    return {
        "files": [str(path) for path in paths],
        "request": json.loads(result.request.to_json()),
        "provenance": result.provenance,
        "timings": result.timings,
        "notes": list(result.notes),
    }


def print_notes(results: Sequence["Result"]) -> None:
    """Print each note of the results once."""
    for note in dict.fromkeys(note for result in results for note in result.notes):
        print(f"imprompt: {note}", file=sys.stderr)


def _print_summary(result: "Result") -> None:
    request, took = result.request, result.timings
    assert request.size is not None  # filled in when drawn
    seconds = took["load"] + took["encode"] + took["draw"]
    what = f"{request.count} ×" if request.frames is None else f"{request.count} × {request.frames} frames of"
    print(
        f"imprompt: {what} {request.size[0]}×{request.size[1]}, seed {request.seed}, "
        f"{request.steps} steps, {seconds:.1f} s (loading {took['load']:.1f})",
        file=sys.stderr,
    )


def _check_gif_pace(target: Path, request: Request) -> None:
    """Refuse before drawing a frame rate that a GIF cannot hold; a video's own is looked up."""
    fps = request.fps if target.suffix.lower() == ".gif" else 0
    if fps is None and request.video is not None:
        from imprompt.encoders.video import read_clip

        fps = read_clip(check_path(request.video, "video"), request.video)[1]
    if fps:
        check_fps(".gif", fps)


def _sweep(task: str, args: argparse.Namespace, request: Request) -> int:
    from imprompt.app.sweep import sweep
    from imprompt.generation.sweep import expand, read_axis

    refuse_with(args, "goes with a single request; leave --sweep out")
    check_swept(task, args, args.sweep)
    asked = expand(request, [read_axis(text) for text in args.sweep]).requests
    target, numbered = target_path(args.output, task, request.replace(count=min(len(asked), 100)))
    for each in asked:
        _check_gif_pace(target, each)
    with network(args):
        results, paths = sweep(
            request, args.sweep, target, engine=make_engine(args), overwrite=args.overwrite, numbered=numbered
        )
    print_notes(results)
    if args.json:
        pictures = [to_dict(result, [path]) for result, path in zip(results, paths, strict=False)]
        print(json.dumps({"pictures": pictures, "grid": str(paths[-1])}))
    else:
        print("\n".join(map(str, paths)))
    return 0


def check_swept(task: str, args: argparse.Namespace, axes: Sequence[str]) -> None:
    """Raise :class:`UsageError` for flags and options whose value each of the swept ones replaces, if the
    request can do without them."""
    from imprompt.generation.sweep import read_axis

    stated = _stated(task, args)
    for axis in map(read_axis, axes):
        place, _, name = axis.field.rpartition(".")
        kind, number = place.rstrip("0123456789") or "image", place.lstrip("abcdefghijklmnopqrstuvwxyz")
        records = stated.get(f"{kind}s", ())
        chosen = records[int(number) - 1 : int(number)] if number else records
        own = not place and name in Request.model_fields
        said = name in stated if own else any(name in each.model_fields_set for each in chosen)
        if said and name not in _NEEDED:
            what = f"--{name.replace('_', '-')}" if own else f"{name}= of --{kind}"
            raise UsageError(f"{what}: has no effect, for {name} is swept ({axis.field}=…); leave it out.")


def refuse_with(args: argparse.Namespace, reason: str) -> None:
    """Raise :class:`UsageError` for flags that only make sense for a single request."""
    for flag in ("explain", "save_control"):
        if getattr(args, flag):
            raise UsageError(f"--{flag.replace('_', '-')}: {reason}.")
