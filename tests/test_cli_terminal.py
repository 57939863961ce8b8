"""At a terminal: what people copy stays whole, colour means something, and an error is one sentence."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rematerialize.report.origin import Origin
from rematerialize.units import format_bytes
from rematerialize.zoo import ENTRIES
from rematerialize.zoo.figures import figures
from tests.cli import ROOT, on_terminal
from tests.reports import a_step
from tests.test_cli import a_graph
from tests.test_report_export_cli import a_plan

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|38;[\d;]+)m")


def plain(shown: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", shown)


@pytest.fixture
def graph_file(tmp_path: Path) -> str:
    (tmp_path / "graph.json").write_text(a_graph().to_json(), encoding="utf-8")
    return str(tmp_path / "graph.json")


@pytest.mark.parametrize("columns", [60, 69, 70, 80, 129, 130, 200])
def test_targets_and_specs_stay_whole_in_the_zoos_table(columns: int) -> None:
    code, shown = on_terminal("zoo", columns=columns, no_color=True)
    assert code == 0
    assert max(map(len, plain(shown).splitlines())) <= columns
    words = set(plain(shown).split())
    for name in ENTRIES:
        assert f"zoo:{name}" in words
        assert set(figures()[name]["test"].inputs.split()) <= words


@pytest.mark.parametrize("columns", [30, 45, 52, 60, 80, 140])
def test_no_value_is_broken_however_narrow_the_terminal(columns: int, tmp_path: Path) -> None:
    origin = Origin("net.py:make", "float32", "AMD EPYC 9654", asked="50%", whole=True)
    plan = replace(a_plan(), origin=origin)
    plan.save(tmp_path / "plan.json")
    code, shown = on_terminal("explain", str(tmp_path / "plan.json"), columns=columns, no_color=True)
    assert code == 0
    lines = plain(shown).splitlines()
    assert max(map(len, lines)) <= columns
    rows = [cell for row in plan.explain(2).rows() for cell in row if cell.endswith(" B")]
    assert rows
    for value in (*rows, "net.layers", format_bytes(plan.peak_bytes), format_bytes(plan.minimum_bytes)):
        assert any(value in line for line in lines), value
    sizes = re.findall(r"\d (?:[KMG]i)?B\b", "\n".join(lines))
    assert len(sizes) == len(re.findall(r"\b(?:[KMG]i)?B\b", "\n".join(lines)))


def test_a_line_that_is_not_the_users_is_said_to_be_none(tmp_path: Path) -> None:
    graph = a_step()
    nameless = replace(graph, ops=tuple(replace(op, source="") for op in graph.ops))
    replace(a_plan(), graph=nameless).save(tmp_path / "plan.json")
    _, shown = on_terminal("explain", str(tmp_path / "plan.json"), "--ops", columns=140, no_color=True)
    assert "(no line of yours)" in plain(shown)


def test_a_budget_that_does_not_fit_is_one_sentence_at_a_terminal(graph_file: str) -> None:
    asked = ("solve", graph_file, "--budget", "10", "-q")
    code, shown = on_terminal(*asked)
    assert code == 3
    assert shown.startswith("rematerialize: error: ")
    assert shown.count("\n") == 1
    code, shown = on_terminal(*asked, "--json")
    assert code == 3
    assert json.loads(shown.splitlines()[0])["minimum_bytes"] > 10


@pytest.mark.parametrize(
    ("style", "no_color", "coloured"), [("red", False, True), ("red", True, False), ("", False, False)]
)
def test_a_row_is_coloured_where_it_means_something(style: str, no_color: bool, coloured: bool, tmp_path: Path) -> None:
    (tmp_path / "shows.py").write_text(
        "from rematerialize.cli.console import Console\n"
        f"Console().table('T', ('a', 'b'), [('x', '1'), ('y', '2')], styles=['', {style!r}])\n",
        encoding="utf-8",
    )
    shown = on_terminal(program=("shows.py",), cwd=tmp_path, no_color=no_color)[1]
    rows = {plain(line).split()[0]: line for line in shown.splitlines() if plain(line).split()}
    assert bool(COLOUR.search(rows["y"])) == coloured
    assert not COLOUR.search(rows["x"])


def test_an_interrupt_while_python_imports_is_one_line_and_exit_code_130(tmp_path: Path) -> None:
    """The first import of the application stands still until it is interrupted."""
    (tmp_path / "typer.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n", encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "rematerialize", "zoo"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell's processes ignore it
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "rematerialize: interrupted\n")
