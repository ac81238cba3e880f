"""Stage 1: emoji pictures with captions, from pinned npm packages, rendered at 128×128 on white.

Output: ``data/<style>/<code point>.png`` and ``data/metadata.jsonl``, one row a picture:
``{"file_name", "groups": {"concept", "style"}, "captions": {"full", "concept", "style"}, "split", "core"}``.
``split`` is decided by a seedless hash of the code point, so that it is the same on every machine and for
every vocabulary: 5 % of the concepts in all styles (``held_out_concept``) and another 5 % of the
(concept, style) pairs (``held_out_pair``) are never trained on, in any stage. ``core`` marks the everyday
concepts drawn by at least six of the eight styles: what a training run on a CPU has time to learn.

    python recipes/emoji/data.py [--out recipes/emoji/data] [--packages FOLDER]
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import resvg_py
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).parent
SIZE = 128
CORE_STYLES = 6
CORE_CATEGORIES = {
    "Animals & Nature": r".",
    "Food & Drink": r".",
    "Travel & Places": r"transport-(ground|air|water)|sky & weather|place-(building|geographic|other)",
    "Activities": r"sport|game|event|award-medal|arts & crafts",
    "Objects": r"musical-instrument|tool|light & video|book-paper|household|lock|phone|computer",
    "Smileys & Emotion": (
        r"face-(smiling|affection|hat|glasses|costume|neutral-skeptical|concerned)|heart|cat-face"
    ),
}
SKIP_NAME = re.compile(r"skin-tone|keycap|o-clock|-thirty|button|moon-face|no-|mailbox-|tone-|new-moon|-moon")
SKIP_CODE = re.compile(r"1f3f[b-f]|1f1[ef]")


def fetch(name: str, source: dict, packages: Path) -> Path:
    """The package's tarball, downloaded once by npm, its SHA-256 checked against ``sources.json``."""
    path = packages / f"{name}.tgz"
    if not path.exists():
        packages.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["npm", "pack", source["npm"], "--silent"], cwd=packages, check=True, stdout=subprocess.DEVNULL
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != source["sha256"]:
        raise SystemExit(
            f"{path} has SHA-256 {digest}, sources.json expects {source['sha256']}: delete it and retry"
        )
    return path


def members(tarball: Path, pattern: str) -> dict[str, bytes]:
    found = {}
    with tarfile.open(tarball) as tar:
        for member in tar:
            if member.isfile() and re.search(pattern, member.name):
                found[member.name.removeprefix("package/")] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


def bare(code: str) -> str:
    """A code point sequence without variation selectors, lower case: one key for one emoji."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f").lstrip("0")


def squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def render(body: str, box: tuple[float, float, float, float]) -> Image.Image:
    left, top, width, height = box
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{SIZE}" height="{SIZE}" color="#000">{body}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
    return on_white(Image.open(io.BytesIO(png)))


def on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def pictures(
    name: str, source: dict, tarball: Path, slugs: dict[str, str], codes: dict[str, str]
) -> Iterator[tuple[str, Image.Image]]:
    """(code point, picture) of one package. ``slugs``: icon name → code; ``codes``: squashed name → code."""
    if name.startswith("lobehub"):
        for file, content in members(tarball, r"assets/.*\.webp$").items():
            image = on_white(Image.open(io.BytesIO(content)))
            yield bare(Path(file).stem), image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        return
    icons = json.loads(members(tarball, r"^package/icons\.json$")["icons.json"])
    for slug, icon in icons["icons"].items():
        code = (
            codes.get(squash(slug))
            if source["style"] == "fxemoji"
            else slugs.get(slug) or codes.get(squash(slug))
        )
        if code is None or icon.get("hidden"):
            continue
        box = tuple(
            float(icon.get(key, icons.get(key, default)))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        yield code, render(icon["body"], box)  # type: ignore[arg-type]


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(code: str, style: str) -> str:
    if hashed(code) % 20 == 0:
        return "held_out_concept"
    return "held_out_pair" if hashed(f"{code}|{style}") % 20 == 0 else "train"


def article(noun: str) -> str:
    if re.search(r"[^sui]s$", noun):  # cherries, skis, fireworks
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def captions(names: list[str], style: str) -> dict[str, list[str]]:
    nouns = [article(name) for name in names]
    return {
        "full": [f"{noun}, {style} style" for noun in nouns] + [f"{style} style {names[0]}"],
        "concept": nouns,
        "style": [f"{style} style"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--packages", type=Path, default=HERE / "runs" / "packages")
    args = parser.parse_args()
    sources = json.loads((HERE / "sources.json").read_text())
    tarballs = {
        name: fetch(name, source, args.packages) for name, source in tqdm(sources.items(), "packages")
    }

    emoji = json.loads(members(tarballs["emoji-datasource-16.0.0"], r"package/emoji\.json$")["emoji.json"])
    chars = json.loads(members(tarballs["iconify-json-noto-1.2.9"], r"package/chars\.json$")["chars.json"])
    slugs = {slug: bare(code) for code, slug in chars.items()}
    # Later rows must not overwrite earlier ones: short names win over long ones, as Firefox's set uses them.
    codes: dict[str, str] = {}
    for keys in (lambda e: e["short_names"], lambda e: [e["name"] or ""]):
        for entry in emoji:
            for key in keys(entry):
                codes.setdefault(squash(key), bare(entry["unified"]))
    about = {bare(entry["unified"]): entry for entry in emoji}
    slug_of = {code: slug for slug, code in slugs.items()}

    found: dict[str, dict[str, Image.Image]] = defaultdict(dict)
    for name, source in sources.items():
        if source["style"] is None:
            continue
        for code, image in tqdm(
            pictures(name, source, tarballs[name], slugs, codes), source["style"], leave=False
        ):
            entry = about.get(code)
            if entry is None or entry["category"] in ("Flags", "Component") or SKIP_CODE.search(code):
                continue
            if image.getextrema() != ((255, 255),) * 3:
                found[code].setdefault(source["style"], image)

    rows = []
    for code in tqdm(sorted(found), "write"):
        entry, by_style = about[code], found[code]
        concept = slug_of.get(code, entry["short_name"].replace("_", "-"))
        pattern = CORE_CATEGORIES.get(entry["category"])
        core = bool(
            len(by_style) >= CORE_STYLES
            and pattern
            and re.search(pattern, entry["subcategory"])
            and not SKIP_NAME.search(concept)
        )
        names = list(
            dict.fromkeys(
                [concept.replace("-", " "), entry["short_name"].replace("_", " ").replace("-", " ")]
            )
        )
        for style, image in sorted(by_style.items()):
            file = Path(style) / f"{code}.png"
            (args.out / style).mkdir(parents=True, exist_ok=True)
            image.save(args.out / file, optimize=True)
            rows.append(
                {
                    "file_name": file.as_posix(),
                    "groups": {"concept": concept, "style": style},
                    "captions": captions(names, style),
                    "split": split_of(code, style),
                    "core": core,
                    "category": entry["category"],
                }
            )
    (args.out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = [row for row in rows if row["core"]]
    concepts = {row["groups"]["concept"] for row in kept}
    print(f"{len(rows)} pictures of {len(found)} concepts; core: {len(kept)} of {len(concepts)}")


if __name__ == "__main__":
    main()
