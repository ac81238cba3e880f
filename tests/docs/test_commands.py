"""Every command and script of the documentation runs, page by page, as a reader would run it.

A fenced ``sh`` or ``python`` block runs unless ``<!-- needs: … -->`` stands before it; such a command must at
least be understood, so that it fails for the missing model or file (3, 4) and not for its usage (2).
"""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from imprompt.app import cli, drawing
from imprompt.generation.engine import Engine

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md")])
DRAWING = ("generate", "edit", "inpaint", "animate", "tune")
SHORT = (*DRAWING, "train", "evaluate")
"""Commands that are run short: two steps, pictures of 64 × 64 where nothing says their size, two
scales, evaluation on two pictures."""
ENDLESS = ("serve",)
"""Commands that run until they are stopped; their flags are read."""
FOREIGN = ("pip", "make", "curl", "python", "docker", "srun", "torchrun", "xdg-open")
"""Programs that are not ours."""
BLOCK = re.compile(r"(<!-- needs: [^>]* -->\n+)?```(sh|python)\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    runs: bool

    @property
    def commands(self) -> list[list[str]]:
        """Each line's words; lines ending in a backslash go on."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(language, text, not needs) for needs, language, text in found]


def test_the_pages_are_found() -> None:
    assert len(PAGES) > 15
    assert sum(len(blocks(page)) for page in PAGES) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawing, "make_engine", lambda args: shared_engine())  # loads the model once
    for block in blocks(page):
        if block.language == "python":
            run_script(block)
            continue
        for words in block.commands:
            code = run_command(words, block.runs)
            said = capsys.readouterr()
            expected = {0} if block.runs else {0, 3, 4}
            assert code in expected, f"{shlex.join(words)}: {said.err}"


@cache
def shared_engine() -> Engine:
    return Engine(quiet=True)


def run_script(block: Block) -> None:
    program = compile(block.text, "documentation", "exec")
    if block.runs:
        exec(program, {"__name__": "__main__"})


def run_command(words: list[str], runs: bool) -> int:
    program, *rest = words
    if program != "imprompt":
        assert program in FOREIGN, f"unknown program in {shlex.join(words)}"
        return 0
    if rest[0] in ENDLESS:
        rest = [rest[0], "--help"] if "--help" in rest else [*rest, "--help"]
    if rest[0] in SHORT:
        rest += [] if "--steps" in rest else ["--steps", "2"]
        rest += ["--quiet"]
    if rest[0] in ("generate", "animate", "tune") and not {"--size", "--from", "--base", "--video"} & {*rest}:
        rest += ["--size", "64"]
    if rest[0] == "evaluate" and "--scales" not in rest:
        rest += ["--scales", "0.3,1"]
    if rest[0] == "evaluate":
        rest += ["-n", "2"]  # the last one counts
    if rest[0] == "train":
        rest += ["--sample-every", "0"]
    if rest[0] == "animate" and "at=15" not in " ".join(rest):
        rest += ["--frames", "4"]
    if rest[0] in DRAWING and not runs:
        for name in named_pictures(rest):
            Image.new("RGB", (64, 64), "gray").save(name)
    return cli.main(rest)


def named_pictures(words: list[str]) -> list[str]:
    """Pictures that a command reads and nobody has drawn here."""
    named = re.findall(
        r"[\w-]+\.(?:png|jpg)", " ".join(words[: words.index("-o")] if "-o" in words else words)
    )
    return [name for name in dict.fromkeys(named) if not Path(name).exists()]


def test_the_messages_of_the_troubleshooting_page_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^`([^`]+)`\n:", page, re.MULTILINE)
    source = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source) + "unrecognized arguments"  # argparse says that one
    assert len(messages) > 10
    assert [message for message in messages if message not in source] == []
