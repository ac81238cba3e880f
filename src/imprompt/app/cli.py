"""The command line: ``imprompt VERB …``. It reads flags into a request, and prints what came of it.

Only the chosen verb's parser is built, and nothing heavy is imported before the flags are known to be right:
``imprompt --help`` answers at once, and ``info``, ``models`` and ``inspect`` never load torch's libraries of
models. Pictures' names and machine-readable results go to stdout, all else to stderr; an error is one line
and an exit code (2 usage, 3 model, 4 input, 130 interrupted).
"""

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from imprompt.errors import ImpromptError, InputError, ModelError, UsageError

if TYPE_CHECKING:
    from imprompt.generation.engine import Result
    from imprompt.schema.request import ControlRef, ImageRef, RegionRef, Request

INTERRUPTED = 130
_HURRIED = ("generate", "edit", "inpaint", "animate")
"""Commands of which a second is saved by leaving at once: see :func:`_leave`."""
_YOUNG_OBJECTS = 100_000


@dataclass(frozen=True)
class Verb:
    """One command: what it is for, its flags, and what it does with them."""

    about: str
    flags: Callable[[argparse.ArgumentParser], None]
    """Adds them; a verb whose flags are read elsewhere gets them as ``rest``."""
    run: Callable[[argparse.Namespace], None]


class _Parser(argparse.ArgumentParser):
    """Wrong flags are an error like any other: one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; as a program (without ``arguments``) it may end here."""
    if arguments is not None:
        return _run(list(arguments))
    given = sys.argv[1:]
    hurried = bool(given) and given[0] in _HURRIED
    if hurried:
        # Importing makes a million objects that stay; looking through them for garbage took 1 s of 8.
        gc.set_threshold(_YOUNG_OBJECTS)
    code = _run(given)
    if hurried:
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """End the process without taking torch's thousands of modules apart, which took 0.9 s of 8. Everything
    is written by then, and nothing of ours waits for the interpreter's end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads any more, or it is closed
            code = code or 1
    os._exit(code)


def _run(given: list[str]) -> int:
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    try:
        return _dispatch(given)
    except KeyboardInterrupt:
        print("imprompt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except ImpromptError as error:
        if debug:
            raise
        print(f"imprompt: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except Exception as error:  # the last boundary; whatever arrives here is a fault of ours
        if debug:
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"imprompt: error: unexpected {said} (--debug shows where; please report it)", file=sys.stderr)
        return 1


def _dispatch(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if given[0] in ("-V", "--version"):
        from imprompt import __version__

        print(f"imprompt {__version__}")
        return 0
    name, *rest = given
    if name not in VERBS:
        import difflib

        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(VERBS)}."
        raise UsageError(f"no command '{name}'; {hint}")
    verb = VERBS[name]
    parser = _Parser(prog=f"imprompt {name}", description=verb.about, allow_abbrev=False)
    verb.flags(parser)
    try:
        flags = argparse.Namespace(rest=rest) if verb.run is _evaluate else parser.parse_intermixed_args(rest)
        verb.run(flags)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    return 0


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.about}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: imprompt COMMAND … (imprompt COMMAND --help says more)",
            "",
            "Show a diffusion model a picture and it draws with it.",
            "",
            *lines,
            "",
            "  --version, --debug (show where an error came from)",
        ]
    )


# ---- generate, edit, inpaint


def _drawing_flags(parser: argparse.ArgumentParser) -> None:
    from imprompt.schema.request import ControlRef, ImageRef, RegionRef, Request

    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the epilog's lines
    said = [_options_of("--image", ImageRef), _options_of("--region", RegionRef)]
    parser.epilog = "\n\n".join([*said, _options_of("--control", ControlRef)])

    def field(flag: str, **options: object) -> None:
        name = flag.lstrip("-").replace("-", "_")
        about = (Request.model_fields[name].description or "").replace("%", "%%")
        parser.add_argument(flag, dest=name, help=about, default=None, **options)  # type: ignore[arg-type]

    parser.add_argument(
        "--image",
        dest="images",
        action="append",
        metavar="PATH[,scale=…,mask=…,…]",
        help="a picture that prompts the model; may be given several times (options below)",
    )
    parser.add_argument(
        "--region",
        dest="regions",
        action="append",
        metavar="TEXT,mask=PATH[,feather=…]",
        help="a text for one place, in place of the prompt; may be given several times (options below)",
    )
    parser.add_argument(
        "--control",
        dest="controls",
        action="append",
        metavar="KIND:PATH[,scale=…,…]",
        help="a picture whose structure is followed; may be given several times (options below)",
    )
    parser.add_argument(
        "--save-control", action="store_true", help="also write the map that each control followed"
    )
    field("--scale", metavar="X")
    field("--adapter", metavar="NAME")
    field("--base", metavar="NAME")
    field("--face-model", metavar="FOLDER")
    parser.add_argument(
        "--lora",
        dest="loras",
        action="append",
        metavar="PATH[,weight=…]",
        help="a LoRA for the base: .safetensors, folder or hub id; may be given several times",
    )
    parser.add_argument(
        "--embedding",
        dest="embeddings",
        action="append",
        metavar="PATH[,token=…]",
        help="a word of textual inversion (.safetensors); may be given several times",
    )
    field("--negative", metavar="TEXT")
    field("--steps", metavar="N")
    field("--guidance", metavar="X")
    field("--image-guidance", metavar="X")
    field("--scheduler", metavar="NAME")
    field("--size", metavar="WxH")
    field("--count", metavar="N")
    field("--seed", metavar="N")
    field("--device")
    field("--dtype")
    field("--offload")
    field("--quantize", metavar="int8|float8|FILE.gguf")
    parser.add_argument(
        "--sweep",
        action="append",
        metavar="FIELD=VALUE,…",
        help="draw with each of these values, and all combinations when given several times; also as one "
        "page. A field of the request, or of its images (profile, image2.scale)",
    )
    parser.add_argument(
        "--from",
        dest="again",
        metavar="PICTURE",
        help="repeat that picture's request, or that of a .json; other flags change it",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help=".png, .jpg or .webp, or a folder; animate: .gif, .webp, .mp4 (needs ffmpeg), or a folder "
        "of frames (new, or of an earlier clip); default: a free name here",
    )
    parser.add_argument(
        "--explain", action="store_true", help="also draw where, in which layers and when each image acted"
    )
    parser.add_argument("--json", action="store_true", help="print files, request and timings as JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def _options_of(flag: str, record: type["ImageRef | RegionRef | ControlRef"]) -> str:
    """The options that one repeatable flag takes, a paragraph each, as ``--help`` ends with."""
    import textwrap

    lines = [f"options of {flag}:"]
    for name, field in record.model_fields.items():
        if name != "path" and (flag, name) != ("--region", "text"):
            lines += textwrap.wrap(
                f"{name:<12}{field.description}",
                98,
                initial_indent="  ",
                subsequent_indent=" " * 14,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def _generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="what to draw; may be left out with --image")
    _drawing_flags(parser)


def _edit_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", nargs="?", metavar="PICTURE", help="the picture to start from")
    parser.add_argument("prompt", nargs="?", help="what to draw; may be left out with --image")
    parser.add_argument(
        "--strength", metavar="X", help="how much of the schedule is drawn anew, 0 to 1; 0.6, inpaint 1"
    )
    _drawing_flags(parser)


def _inpaint_flags(parser: argparse.ArgumentParser) -> None:
    _edit_flags(parser)
    parser.add_argument("--mask", metavar="PATH", help="white is drawn anew, black is kept")


def _animate_flags(parser: argparse.ArgumentParser) -> None:
    from imprompt.schema.request import Request

    parser.add_argument("prompt", nargs="?", help="what to draw; may be left out with --image or --video")
    for name in ("frames", "fps", "motion", "video", "strength", "context", "shared_noise", "noise_path"):
        about = (Request.model_fields[name].description or "").replace("%", "%%").removeprefix("animate: ")
        flag = "--" + name.replace("_", "-")
        parser.add_argument(
            flag, dest=name, default=None, metavar="PATH" if name == "video" else "X", help=about
        )
    _drawing_flags(parser)


def _drawing(task: str) -> Callable[[argparse.Namespace], None]:
    return lambda flags: _draw(task, flags)


def _draw(task: str, flags: argparse.Namespace) -> None:
    from imprompt.output import stills as output

    request = _request(task, flags)
    if flags.save_control and not request.controls:
        raise UsageError("--save-control: there is no control to save; give one with --control.")
    if flags.sweep:
        _sweep(task, flags, request)
        return
    target = _target(flags.output, task, request)
    output.check_target(target, request.task, request.count)
    if flags.save_control:
        output.check_maps(request, target)
    if target.suffix.lower() == ".gif":
        _check_pace(request)

    from imprompt.generation.engine import Engine

    result = Engine(quiet=flags.quiet or not sys.stderr.isatty()).run(request, explain=flags.explain)
    paths = output.save(result, target)
    if flags.explain:
        from imprompt.app.explain import explain

        for found, image, path in zip(result.attributions, result.images, tuple(paths), strict=True):
            paths = [*paths, *explain(found, image, path)]
    if flags.save_control:
        paths = [*paths, *output.save_maps(result.maps, result.request, target)]
    for note in result.notes:
        print(f"imprompt: {note}", file=sys.stderr)
    if flags.json:
        print(json.dumps(_said(result, paths)))
    else:
        for path in paths:
            print(path)
        _summary(result)


def _check_pace(request: "Request") -> None:
    """Say before drawing that a GIF cannot hold the clip's pace; a video's own is looked up."""
    from imprompt.output.clips import check_pace

    pace = request.fps
    if pace is None and request.video is not None:
        from imprompt.generation.video import read_film

        pace = read_film(Path(request.video).expanduser(), request.video)[1]
    if pace is not None:
        check_pace(".gif", pace)


def _sweep(task: str, flags: argparse.Namespace, request: "Request") -> None:
    from imprompt.generation.sweep import read_axis, spread

    if flags.explain:
        raise UsageError("--explain: explains a single request; leave --sweep out.")
    if flags.save_control:
        raise UsageError("--save-control: goes with a single request; leave --sweep out.")
    count = len(spread(request, [read_axis(text) for text in flags.sweep]).requests)
    target = _target(flags.output, task, request.replace(count=min(count, 100)))

    from imprompt.app.sweep import sweep
    from imprompt.generation.engine import Engine

    engine = Engine(quiet=flags.quiet or not sys.stderr.isatty())
    results, paths = sweep(request, flags.sweep, target, engine=engine)
    for note in dict.fromkeys(note for result in results for note in result.notes):
        print(f"imprompt: {note}", file=sys.stderr)
    if flags.json:
        said = [_said(result, [path]) for result, path in zip(results, paths, strict=False)]
        print(json.dumps({"pictures": said, "grid": str(paths[-1])}))
    else:
        print("\n".join(map(str, paths)))


def _tune_flags(parser: argparse.ArgumentParser) -> None:
    _generate_flags(parser)
    parser.add_argument(
        "--prefer", type=float, default=0.5, metavar="X", help="0: all for the text, 1: for the picture; 0.5"
    )


def _tune(flags: argparse.Namespace) -> None:
    request = _request("generate", flags)
    if flags.explain:
        raise UsageError("--explain: explains a single request; repeat the chosen one with it.")
    if flags.save_control:
        raise UsageError("--save-control: goes with a single request; repeat the chosen one with it.")
    if flags.count is None:
        request = request.replace(count=2)

    from imprompt.app.tune import AXES, tune
    from imprompt.generation.engine import Engine

    tuned = tune(
        request,
        flags.output or "tune",
        axes=flags.sweep or AXES,
        prefer=flags.prefer,
        engine=Engine(quiet=flags.quiet or not sys.stderr.isatty()),
        say=lambda line: print(f"imprompt: {line}", file=sys.stderr),
    )
    files = [str(path) for path in tuned.paths]
    if flags.json:
        fidelity = {"text": tuned.fidelity.text, "picture": tuned.fidelity.picture}
        print(json.dumps({"files": files, "chosen": tuned.label, "measure": tuned.measure, **fidelity}))
        return
    print("\n".join(files))
    said = f"{tuned.fidelity.text:.2f} of the text, {tuned.fidelity.picture:.2f} of the picture"
    print(f"imprompt: {tuned.label}: {said}, by the {tuned.measure}", file=sys.stderr)


def _request(task: str, flags: argparse.Namespace) -> "Request":
    from imprompt.output.stills import read_request
    from imprompt.schema.request import (
        ControlRef,
        EmbeddingRef,
        ImageRef,
        LoraRef,
        RegionRef,
        Request,
    )

    stated: dict[str, object] = {
        name: value
        for name, value in vars(flags).items()
        if name in Request.model_fields and value is not None
    }
    if getattr(flags, "picture", None) is not None:
        stated["image"] = flags.picture
    readers: dict[str, Callable[[str], object]] = {
        "images": ImageRef.parse,
        "regions": RegionRef.parse,
        "controls": ControlRef.parse,
        "loras": LoraRef.parse,
        "embeddings": EmbeddingRef.parse,
    }
    for name, read in readers.items():
        if name in stated:
            stated[name] = tuple(read(text) for text in getattr(flags, name))
    if flags.again is None:
        return Request.from_mapping({"task": task, **stated})
    if flags.again.endswith(".json"):
        try:
            before = Request.from_json(Path(flags.again).read_bytes())
        except OSError as error:
            raise InputError(f"cannot read '{flags.again}' ({error.strerror or error}).") from error
    else:
        before = read_request(flags.again)
    if before.task != task:
        raise UsageError(
            f"'{flags.again}' was made with 'imprompt {before.task}': repeat it with 'imprompt {before.task} "
            f"--from {flags.again}'."
        )
    if stated.keys() & {"images", "regions", "controls", "image", "mask", "video"}:
        stated["hashes"] = {}
    return before.replace(**stated)


def _target(given: str | None, task: str, request: "Request") -> Path:
    from imprompt.output.stills import free_name, our_frames

    suffix = ".gif" if task == "animate" else ".png"
    if given is None:
        return free_name(Path(), task, request.count, suffix)
    if task == "animate" and our_frames(Path(given)):
        return Path(given)
    if given.endswith(("/", "\\")) or Path(given).is_dir():
        return free_name(Path(given), task, request.count, suffix)
    return Path(given)


def _said(result: "Result", paths: Sequence[Path]) -> dict[str, object]:
    return {
        "files": [str(path) for path in paths],
        "request": json.loads(result.request.to_json()),
        "provenance": result.provenance,
        "timings": result.timings,
        "notes": list(result.notes),
    }


def _summary(result: "Result") -> None:
    request, took = result.request, result.timings
    seconds = took["load"] + took["encode"] + took["draw"]
    print(
        f"imprompt: {len(result.images)} × {request.size[0]}×{request.size[1]}, seed {request.seed}, "  # type: ignore[index]
        f"{request.steps} steps, {seconds:.1f} s (loading {took['load']:.1f})",
        file=sys.stderr,
    )


# ---- looking at things


def _info_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", help="a picture that imprompt made")
    parser.add_argument("--json", action="store_true", help="the whole record as JSON")


def _info(flags: argparse.Namespace) -> None:
    from imprompt.output.stills import read_record

    record = read_record(flags.picture)
    if flags.json:
        print(record.to_json())
        return
    for name, value in json.loads(record.request.to_json()).items():
        if value not in (None, "", {}, []):
            print(f"{name:<11} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    print("made with   " + ", ".join(f"{name} {value}" for name, value in record.provenance.items()))


def _models_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="one base or adapter")
    parser.add_argument("--vocabulary", action="store_true", help="the words the bundled model knows")
    parser.add_argument(
        "--commercial", action="store_true", help="only what anyone may use commercially, by its licence"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def _models(flags: argparse.Namespace) -> None:
    from dataclasses import asdict

    from imprompt.catalog.entries import (
        ADAPTERS,
        BASES,
        CONTROLS,
        DEFAULT_ADAPTERS,
        DEFAULT_MOTIONS,
        MOTIONS,
        cached,
        named,
    )

    if flags.vocabulary:
        if flags.name not in (None, "emoji"):
            raise UsageError(
                f"--vocabulary: only the bundled model 'emoji' lists its words, not '{flags.name}'."
            )
        _vocabulary(as_json=flags.json)
        return
    bases, adapters, motions, controls = dict(BASES), dict(ADAPTERS), dict(MOTIONS), dict(CONTROLS)
    if flags.name is not None:
        named({**BASES, **ADAPTERS, **MOTIONS, **CONTROLS}, flags.name, "model", "no name for the whole list")
        controls = {
            name: net
            for name, net in CONTROLS.items()
            if name == flags.name or (flags.name in BASES and net.family == BASES[flags.name].family)
        }
        bases = {name: row for name, row in BASES.items() if name == flags.name}
        adapters = {
            name: row
            for name, row in ADAPTERS.items()
            if name == flags.name or (flags.name in BASES and row.family == BASES[flags.name].family)
        }
        motions = {
            name: motion
            for name, motion in MOTIONS.items()
            if name == flags.name or (flags.name in BASES and motion.family == BASES[flags.name].family)
        }
    if flags.commercial:
        from imprompt.catalog.licences import commercial

        bases = {name: row for name, row in bases.items() if commercial(row.licence)}
        adapters = {name: row for name, row in adapters.items() if commercial(row.licence)}
        motions = {name: row for name, row in motions.items() if commercial(row.licence)}
        controls = {name: row for name, row in controls.items() if commercial(row.licence)}
    here = {name: cached(base.repo, "model_index.json") for name, base in bases.items()}
    here |= {f"adapter {name}": cached(row.repo, row.file) for name, row in adapters.items()}
    if flags.json:
        tables = {
            "controls": {name: asdict(net) for name, net in controls.items()},
            "motions": {name: asdict(motion) for name, motion in motions.items()},
            "bases": {name: asdict(base) | {"cached": here[name]} for name, base in bases.items()},
            "adapters": {
                name: asdict(row) | {"cached": here[f"adapter {name}"]} for name, row in adapters.items()
            },
        }
        print(json.dumps(tables))
        return
    if bases:
        print("bases (--base; + is on this machine)")
    for name, base in bases.items():
        mark = "+" if here[name] else " "
        print(f" {mark} {name:<27} {base.size:>5} px  {base.note}; {base.licence}; {base.repo}")
    if adapters:
        print("adapters (--adapter; * is the default of its base, + is on this machine)")
    for name, row in adapters.items():
        star = "*" if DEFAULT_ADAPTERS.get(row.family) == name else " "
        mark = "+" if here[f"adapter {name}"] else " "
        face = f"; faces by {row.face_pack}" if row.face_pack else ""
        form = "; a pickle: imprompt convert first" if row.pickled else ""
        said = f"{row.note}; {row.megabytes} MB; {row.licence}; {row.repo}{face}{form}"
        print(f"{star}{mark} {name:<27} {row.family:<6} {said}")
    if controls:
        print("controls (--control KIND:PATH,model=NAME; without model, the base's default for the kind)")
    for name, net in controls.items():
        kinds = ", ".join(net.modes) + (f" ({net.note})" if net.note else "")
        print(f"  {name:<17} {net.family:<6} {kinds}; {net.megabytes} MB; {net.licence}; {net.repo}")
    if motions:
        print("motion adapters (--motion; * is the default of its base)")
    for name, motion in motions.items():
        star = "*" if DEFAULT_MOTIONS[motion.family] == name else " "
        about = f"{motion.note}; {motion.megabytes} MB; {motion.licence}; {motion.repo}"
        print(f"{star} {name:<15} {motion.family:<6} {about}")


def _vocabulary(*, as_json: bool) -> None:
    place = Path(__file__).parents[1] / "assets" / "emoji" / "vocabulary.json"
    if not place.is_file():
        raise ModelError("the bundled model's vocabulary.json is missing; install imprompt again.")
    text = place.read_text(encoding="utf-8")
    if as_json:
        print(text.strip())
        return
    known = json.loads(text)
    concepts = [name.replace("-", " ") for name in known["concepts"]]  # as captions say them
    print(f"{len(concepts)} concepts: {', '.join(concepts)}")
    print(f"{len(known['styles'])} styles: {', '.join(known['styles'])}")
    article = "an" if concepts[0][0] in "aeiou" else "a"
    print(f'Say both: "{article} {concepts[0]}, {known["styles"][0]} style".')


def _inspect_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="an adapter's .safetensors file")
    parser.add_argument("--variant", help="take it for this variant or published file")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _inspect(flags: argparse.Namespace) -> None:
    from imprompt.catalog.entries import fitting
    from imprompt.checkpoints.checkpoint import inspect

    found = inspect(flags.file, variant=flags.variant)
    fits = fitting(found.base)
    if flags.json:
        print(json.dumps(found.to_dict() | {"fits": fits}))
    else:
        print(found)
        print(f"{'fits':<14}{', '.join(fits) or 'no base with a name'}")


def _convert_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="a .bin, .ckpt or .pt adapter, a training checkpoint, a .ipadpt of faces or pictures, or a "
        "name of imprompt models",
    )
    parser.add_argument("target", help="the .safetensors file to write")
    parser.add_argument("--variant", help="what it is, where its weights leave that open")


def _convert(flags: argparse.Namespace) -> None:
    from imprompt.catalog.entries import ADAPTERS
    from imprompt.checkpoints.checkpoint import convert

    source = flags.source
    if source.lower().endswith(".ipadpt"):
        from imprompt.app.embed import from_ipadpt

        print(from_ipadpt(source, flags.target))
        return
    if source in ADAPTERS and not Path(source).exists():
        from imprompt.generation.families import adapter_file

        source = adapter_file(source)
    print(convert(source, flags.target, variant=flags.variant))


def _profiles_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", nargs="?", help="one profile, or weights; without it all are shown")
    parser.add_argument("--base", default="emoji", metavar="NAME", help="whose layers: emoji, sd15, sdxl, …")
    parser.add_argument("--json", action="store_true", help="the weights as JSON")


def _profiles(flags: argparse.Namespace) -> None:
    from imprompt.app.profiles import charts, tables

    if flags.json:
        print(json.dumps(tables(flags.base, flags.profile)))
    else:
        print(charts(flags.base, flags.profile))


def _embed_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="what to embed, in this order")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the .safetensors to write")
    parser.add_argument("--encoder", metavar="NAME", help="an image encoder: folder, or repo:folder")
    parser.add_argument("--base", default="emoji", metavar="NAME", help="whose default adapter to embed for")
    parser.add_argument("--adapter", metavar="NAME", help="whose encoder to use")
    parser.add_argument("--framing", default="crop", help="crop, top, bottom, left, right, pad, squash, tile")
    parser.add_argument(
        "--sharpen", type=float, default=0.0, metavar="X", help="0 to 1, at the encoder's size"
    )
    parser.add_argument("--face-model", metavar="FOLDER", help="a face adapter's detector and recogniser")
    parser.add_argument(
        "--face", default="largest", help="a face adapter's face: largest, or a number from 0"
    )


def _embed(flags: argparse.Namespace) -> None:
    from imprompt.app.embed import embed

    print(
        embed(
            flags.pictures,
            flags.output,
            encoder=flags.encoder,
            base=flags.base,
            adapter=flags.adapter,
            framing=flags.framing,
            sharpen=flags.sharpen,
            face_model=flags.face_model,
            face=flags.face,
        )
    )


def _doctor_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def _doctor(flags: argparse.Namespace) -> None:
    from imprompt.app.doctor import examine

    findings = examine()
    if flags.json:
        print(json.dumps(findings))
    else:
        for name, value in findings.items():
            print(f"{name:<14} {value}")
    if findings["self-test"].startswith("failed"):
        raise ModelError(f"the self-test {findings['self-test']}")


# ---- demo, training, evaluation


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", default="imprompt-demo", metavar="FOLDER", help="where it goes")
    parser.add_argument("--seed", type=int, default=7)


def _demo(flags: argparse.Namespace) -> None:
    from imprompt.app.demo import contact_sheet

    print(contact_sheet(flags.output, seed=flags.seed))


def _train_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a folder of captioned pictures, or a run's .toml or .json")
    parser.add_argument("--out", dest="output", metavar="FOLDER", help="where the run goes")
    for flag in ("base", "kind", "steps", "batch", "lr", "seed", "init", "device"):
        parser.add_argument(f"--{flag}", default=None)
    parser.add_argument("--resume", action="store_true", default=None)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any other field")


def _train(flags: argparse.Namespace) -> None:
    from imprompt.training.config import TrainConfig

    names = ("output", "base", "kind", "steps", "batch", "lr", "seed", "init", "device", "resume")
    stated = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    for pair in flags.set:
        name, sign, value = pair.partition("=")
        if not sign:
            raise UsageError(f"--set '{pair}': FIELD=VALUE is expected.")
        try:
            stated[name] = json.loads(value)
        except ValueError:
            stated[name] = value
    source = Path(flags.source)
    if source.suffix in (".toml", ".json") and source.is_file():
        config = TrainConfig.read(source, **stated)
    else:
        if "output" not in stated:
            raise UsageError("--out: say in which folder the run goes.")
        config = TrainConfig.checked({"data": source, **stated})
    from imprompt.training.loop import train

    print(train(config))


def _evaluate_flags(_: argparse.ArgumentParser) -> None:
    """Its flags are the report's own."""


def _evaluate(flags: argparse.Namespace) -> None:
    from imprompt.evaluation.report import main as report

    if code := report(flags.rest):
        raise InputError(f"the evaluation ended with exit code {code}.")


VERBS: dict[str, Verb] = {
    "generate": Verb("draw from text, pictures, or both", _generate_flags, _drawing("generate")),
    "edit": Verb("draw on from a picture (image to image)", _edit_flags, _drawing("edit")),
    "inpaint": Verb("draw a masked part of a picture anew", _inpaint_flags, _drawing("inpaint")),
    "tune": Verb("find the settings that give most of a text and a picture", _tune_flags, _tune),
    "animate": Verb(
        "draw a moving picture from text, pictures, or a video", _animate_flags, _drawing("animate")
    ),
    "info": Verb("show the request inside a picture", _info_flags, _info),
    "models": Verb("list bases, adapters and motion adapters that have a name", _models_flags, _models),
    "inspect": Verb("say what an adapter file is and whether it is sound", _inspect_flags, _inspect),
    "convert": Verb("turn a pickled adapter into safetensors", _convert_flags, _convert),
    "embed": Verb("save pictures' features, to be shown without an encoder", _embed_flags, _embed),
    "profiles": Verb("show how each profile spreads the scale over the layers", _profiles_flags, _profiles),
    "train": Verb("train an adapter on a folder of captioned pictures", _train_flags, _train),
    "evaluate": Verb(
        "measure the bundled model, or another, on held-out pictures", _evaluate_flags, _evaluate
    ),
    "demo": Verb("draw a contact sheet with the bundled model", _demo_flags, _demo),
    "doctor": Verb("look at this machine and test the installation", _doctor_flags, _doctor),
}


if __name__ == "__main__":
    sys.exit(main())
