"""Write the figures of the README, tutorial and page of commands from results and runs, so that none is ever typed.

    python -m benchmarks.readme [--check] [--run [--page docs/tutorial.md]]

A part stands between ``<!-- BEGIN generated: NAME -->`` and ``<!-- END generated -->``. With ``--run`` the
python and console blocks are run in order, beside copies of ``examples/``, and what they print replaces what was shown.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import predictions
from benchmarks.comparison import Cell, Comparison, ModelResult
from benchmarks.records import Record
from benchmarks.solver.report import summary
from rematerialize.report.table import markdown_table
from rematerialize.units import format_bytes, format_percent, format_seconds

AGAIN = ("bench-solver", "bench-lstm")  # runs of their own, after what they measure changed
PAGES = ("README.md", "docs/tutorial.md", "docs/commands.md")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PART = re.compile(
    r"(?P<begin><!-- BEGIN generated: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- END generated -->)", re.DOTALL
)


def demo() -> str:
    """Return the table of the demo's last recorded run."""
    record = json.loads((RESULTS / "demo" / "demo.json").read_text(encoding="utf-8"))
    rows = [_demo_row(cell) for cell in record["cells"]]
    headers = [
        "model",
        "budget",
        "predicted peak",
        "measured peak",
        "of eager's",
        "step time",
        "planning",
        "gradients",
    ]
    versions = record["versions"]
    note = (
        f"`{record['command']}` on {record['device']}, {record['threads']} thread(s), "
        f"torch {versions['torch']};\n"
        f"{record['elapsed_s']:.0f} s in all. Peaks are the allocator's, above what was resident\n"
        "when the step began; step time is over eager's, in alternating runs."
    )
    return f"{markdown_table(headers, rows, '<<>>>>><')}\n\n{note}\n"


def _demo_row(cell: dict[str, Any]) -> list[str]:
    if cell["measured_bytes"] is None:
        return [cell["model"], cell["budget"], "-", "-", "-", "-", "-", cell["gradients"]]
    return [
        cell["model"],
        cell["budget"],
        format_bytes(cell["predicted_bytes"]),
        format_bytes(cell["measured_bytes"]),
        format_percent(cell["measured_bytes"] / cell["eager_bytes"]),
        f"{1 + cell['measured_overhead']:.2f}",
        format_seconds(cell["planning_s"]),
        cell["gradients"],
    ]


def peers() -> str:
    """Return the comparison's short table: us, hand-placed checkpointing and torch's own budget."""
    comparison = Comparison.load(RESULTS / "bench.json")
    again = [Comparison.load(RESULTS / f"{name}.json") for name in AGAIN]
    headers = ["model", "ours 100%", "ours 50%", "ours minimum", "per block", "same peak", "torch's budget at best"]
    rows = [_peers_row(result) for run in (*again, comparison) for result in run.results]
    note = (
        f"`{comparison.command}`, {comparison.device}, {comparison.threads} thread(s), torch "
        f"{comparison.versions['torch']}. Each cell: measured peak / eager's, step time / eager's, medians of one\n"
        "interleaved run. *Per block* is `torch.utils.checkpoint` placed by hand; *same peak* is our time over its\n"
        "time with a plan for its peak. *torch's budget* is the lowest peak that `activation_memory_budget` reaches\n"
        "at 0.5, 0.2, 0.1 or 0. ~~Struck~~ cells ran, but not eager's step: wrong gradients or BatchNorm updated\n"
        "twice. Every cell, with noise and reasons: [bench.md](benchmarks/results/bench.md); later runs of their own:\n"
        + ", ".join(f"[{name}.md](benchmarks/results/{name}.md)" for name in AGAIN)
        + "."
    )
    return f"{markdown_table(headers, rows, '<' + '>' * (len(headers) - 1))}\n\n{note}\n"


def _peers_row(result: ModelResult) -> list[str]:
    cells = {cell.contestant: cell for cell in result.cells}
    torch_cells = [c for c in result.cells if c.contestant.startswith("torch ") and c.peak_ratio is not None]
    best = min(torch_cells, key=lambda cell: cell.peak_ratio or 0.0, default=None)
    ratios = [v.ratio for v in result.verdicts() if v.peer == "per block" and v.ratio is not None]
    return [
        result.model,
        *(_peers_cell(cells.get(name)) for name in ("ours 100%", "ours 50%", "ours minimum", "per block")),
        f"{ratios[0]:.2f}" if ratios else "-",
        _peers_cell(best),
    ]


def _peers_cell(cell: Cell | None) -> str:
    if cell is None or cell.peak_ratio is None or cell.time_ratio is None:
        return "-" if cell is None else cell.status
    text = f"{cell.peak_ratio:.2f}, {cell.time_ratio:.2f}"
    return text if cell.status == "ok" else f"~~{text}~~"


def foretold() -> str:
    """Return how far off predictions are, by their last recorded run."""
    record = Record.load(predictions.FILE, predictions.ModelPredictions)
    where, every = record.provenance.device, "[every plan](../benchmarks/results/predictions.md)"
    return f"{predictions.summary(record.rows)} On {where}; {every}.\n"


PARTS: dict[str, Callable[[], str]] = {"demo": demo, "peers": peers, "solver": summary, "predictions": foretold}


def rewritten(text: str) -> str:
    """Return the page with every generated part made anew."""
    return PART.sub(lambda match: match["begin"] + PARTS[match["name"]]() + match["end"], text)


FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def run(command: list[str], cwd: Path, stdin: str = "") -> str:
    """Return what a command prints on stdout; raise RuntimeError with its stderr when it fails."""
    cache = {"HOME": str(cwd), "XDG_CACHE_HOME": str(cwd / ".cache")}
    env = {**os.environ, **cache, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=cwd, env=env, input=stdin, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command} exits with {done.returncode}: {done.stderr}")
    return done.stdout.replace(str(cwd), "~")


def commands(text: str) -> list[str]:
    """Return the lines that a page's console blocks have typed."""
    blocks = [match["text"] for match in FENCE.finditer(text) if match["language"] == "console"]
    return [line for block in blocks for line in re.findall(r"^\$ (.*)$", block, flags=re.MULTILINE)]


def with_outputs(text: str, cwd: Path) -> str:
    """Return the page as its own blocks would have it: run in order; text is what the last python printed."""
    for example in (ROOT / "examples").glob("*.py"):
        shutil.copy(example, cwd)
    printed = ""

    def fill(match: re.Match[str]) -> str:
        nonlocal printed
        if match["language"] == "python":
            printed = run([sys.executable, "-"], cwd, match["text"])
        if match["language"] == "text":
            return f"```text\n{printed}```"
        if match["language"] == "console":
            return "```console\n" + "".join(f"$ {line}\n{_typed(line, cwd)}" for line in commands(match[0])) + "```"
        return match[0]

    return FENCE.sub(fill, text)


def _typed(line: str, cwd: Path) -> str:
    python = shlex.quote(sys.executable)
    names = f'python() {{ {python} "$@"; }}; rematerialize() {{ {python} -m rematerialize "$@"; }}; '
    return run(["bash", "-c", names + line], cwd)


def take_pictures(cwd: Path) -> None:
    """Put what the tutorial's commands drew under docs/images, and photograph its report, where there is a browser."""
    images = ROOT / "docs" / "images"
    shutil.copy(cwd / "memory.png", images / "memory.png")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print("no chromium: docs/images/report.png stays as it is", file=sys.stderr)
        return
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1000"]
    shot = f"--screenshot={images / 'report.png'}"
    run([browser, *flags, f"--user-data-dir={cwd / 'browser'}", shot, (cwd / "report.html").as_uri()], cwd)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 when stale")
    parser.add_argument("--run", action="store_true", help="run the code blocks, too, and show their output")
    parser.add_argument("--page", choices=PAGES, help="with --run: run the blocks of this page alone")
    args = parser.parse_args()
    stale = []
    for name in PAGES:
        page = ROOT / name
        old = page.read_text(encoding="utf-8")
        new = rewritten(old)
        if args.run and args.page in {None, name}:
            with tempfile.TemporaryDirectory() as folder:
                new = with_outputs(new, Path(folder))
                if name.endswith("tutorial.md") and not args.check:
                    take_pictures(Path(folder))
        if args.check and new != old:
            stale.append(name)
        if not args.check:
            page.write_text(new, encoding="utf-8")
    if stale:
        print(f"stale: {', '.join(stale)}; run `make readme`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
