"""The pages of docs say what is: every command that they type is one, and shows what it prints today."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.readme import FENCE, PAGES, commands, with_outputs
from rematerialize.cli import commands as registered
from rematerialize.cli.app import app
from tests.test_readme import shape

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
CHEAP = ("rematerialize zoo", "rematerialize devices", "|| echo")
SHELL = {"python", "diff", "ulimit", "rematerialize"}


def parser() -> Any:
    """The command line's own parser."""
    assert registered.__all__
    return typer.main.get_command(app)


def words(line: str) -> list[list[str]]:
    """The calls of this package among a shell line's parts."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()<>")
    lexer.whitespace_split = True
    calls: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;()"):
            calls.append([])
        else:
            calls[-1].append(word)
    cut = [call[: next((at for at, word in enumerate(call) if set(word) <= set("<>")), len(call))] for call in calls]
    return [[word for word in call if word != "2"] for call in cut if call and call[0] == "rematerialize"]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_one_that_the_parser_takes(page: str) -> None:
    root = parser()
    for line in commands(TEXTS[page]):
        assert re.match(r"\(?(\w+)", line)[1] in SHELL, line  # type: ignore[index]
        for _, name, *arguments in words(line):
            assert name in root.commands, line
            root.commands[name].make_context(name, arguments).close()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_shows_an_output(page: str) -> None:
    for match in FENCE.finditer(TEXTS[page]):
        if match["language"] == "text":
            assert match["text"].strip(), "make it: python -m benchmarks.readme --run"


def test_every_command_has_its_section_and_its_output() -> None:
    page = TEXTS["docs/commands.md"]
    for name in parser().commands:
        assert f"\n## {name}\n" in page
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert re.search(rf"^\$ rematerialize {name}\b.*\n[^$`]", section, flags=re.MULTILINE), name


def test_the_quick_commands_print_what_is_shown(tmp_path: Path) -> None:
    blocks = [match[0] for match in FENCE.finditer(TEXTS["docs/commands.md"]) if match["language"] == "console"]
    quick = "\n".join(block for block in blocks if any(cheap in block for cheap in CHEAP))
    assert len(commands(quick)) == len(CHEAP)
    assert shape(with_outputs(quick, tmp_path)) == shape(quick)


def test_the_examples_differ_by_the_wrap_alone() -> None:
    plain, planned = ((ROOT / "examples" / name).read_text(encoding="utf-8") for name in ("train.py", "planned.py"))
    new = [line.strip() for line in planned.splitlines()[1:] if line not in plain.splitlines()]
    assert new == ["import rematerialize as remat", 'model = remat.wrap(model, plan=remat.Plan.load("plan.json"))']


def test_every_picture_is_there_and_small() -> None:
    named = [re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text) for text in TEXTS.values()]
    assert any(named)
    for page, found in zip(PAGES, named, strict=True):
        for name in found:
            assert 0 < ((ROOT / page).parent / name).stat().st_size < 200_000
