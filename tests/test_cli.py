"""The command line: data on stdout, progress on stderr, one-line errors, distinct exit codes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import typer

from rematerialize.cli.errors import one_line_errors
from rematerialize.ir import TrainingGraph
from rematerialize.schedule import Schedule
from rematerialize.simulate import simulate
from rematerialize.version import __version__

ROOT = Path(__file__).resolve().parents[1]

FACTORIES = """
    import torch
    from torch import nn

    class Chatty(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*[
                layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.GELU())
            ])
        def forward(self, x):
            print("a model that prints")
            return self.layers(x).sum()

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
        def forward(self, x):
            y = self.layer(x)
            if y.sum() > 0:
                return y.sum()
            return (y * y).sum()

    def make():
        print("a factory that prints")
        return Chatty(), (torch.ones(256, 64),)

    def branches():
        return Branches(), (torch.ones(4, 4),)

    def fails():
        raise KeyError("no such dataset")

    def alone():
        return Chatty()

    number = 3
"""


def run_cli(*args: str, cwd: Path, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "rematerialize", *args],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if code is not None:
        assert done.returncode == code, done.stderr
    return done


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the error's text; it must be the only line on stderr that isn't progress."""
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("rematerialize: error: ")
    assert all(line.startswith("rematerialize: ") for line in lines), done.stderr
    return lines[-1].removeprefix("rematerialize: error: ")


def a_graph(layers: int = 6) -> TrainingGraph:
    """Return a chain of equal layers whose backward reads each activation."""
    ops: list[dict[str, object]] = []
    for i in range(layers):
        ops.append({"name": f"f{i}", "phase": "forward", "inputs": [f"a{i - 1}" if i else "x"], "outputs": [f"a{i}"]})
    for i in reversed(range(layers)):
        incoming = f"d{i + 1}" if i + 1 < layers else "dy"
        ops.append({"name": f"b{i}", "phase": "backward", "inputs": [f"a{i}", incoming], "outputs": [f"d{i}"]})
    return TrainingGraph.from_json(
        {
            "format": "rematerialize.graph/1",
            "storages": {
                "x": 1000,
                "dy": 1000,
                **{f"{kind}{i}": 1000 for kind in "ad" for i in range(layers)},
            },
            "resident": ["x"],
            "tangents": ["dy"],
            "ops": [{"time_s": 1.0, **op} for op in ops],
            "outputs": [f"a{layers - 1}"],
            "gradients": ["d0"],
        }
    )


@pytest.fixture
def graph_file(tmp_path: Path) -> Path:
    path = tmp_path / "graph.json"
    path.write_text(a_graph().to_json(), encoding="utf-8")
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(textwrap.dedent(FACTORIES), encoding="utf-8")
    (tmp_path / "broken.py").write_text("import torch\nraise RuntimeError('half a module')\n", encoding="utf-8")
    (tmp_path / "lacking.py").write_text("import not_installed_anywhere\n", encoding="utf-8")
    return tmp_path


def test_version_is_the_packages(tmp_path: Path) -> None:
    assert run_cli("--version", cwd=tmp_path).stdout == f"rematerialize {__version__}\n"


@pytest.mark.parametrize("args", [("--help",), ("plan", "--help"), ("solve", "--help"), ("-h",)])
def test_help_is_data(args: tuple[str, ...], tmp_path: Path) -> None:
    done = run_cli(*args, cwd=tmp_path)
    assert "Usage: rematerialize" in done.stdout
    assert done.stderr == ""


def test_no_command_is_a_usage_error_that_shows_the_help(tmp_path: Path) -> None:
    done = run_cli(cwd=tmp_path, code=2)
    assert done.stdout == ""
    assert "Usage: rematerialize" in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("nope",),
        ("solve",),
        ("solve", "graph.json"),
        ("solve", "graph.json", "--budget", "30%", "--time-limit", "soon"),
        ("solve", "graph.json", "--budget", "30%", "--time-limit", "-1"),
        ("plan",),
        ("plan", "mine:make", "--frobnicate"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(args: tuple[str, ...], graph_file: Path) -> None:
    done = run_cli(*args, cwd=graph_file.parent, code=2)
    assert the_error(done)
    assert done.stdout == ""


@pytest.mark.parametrize(
    "args",
    [("--help",), ("--version",), ("solve", "graph.json", "--budget", "4000"), ("plan", "mine:make")],
    ids=" ".join,
)
def test_nothing_but_a_good_plan_command_imports_torch(args: tuple[str, ...], graph_file: Path) -> None:
    program = """
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "torch":
                    raise ImportError("torch is blocked here")

        sys.meta_path.insert(0, Blocker())
        from rematerialize.cli import main
        try:
            main(sys.argv[1:])
        except SystemExit as exit:
            assert exit.code in (0, 2), exit.code
        loaded = [name for name in sys.modules if name.split(".")[0] == "torch"]
        assert not loaded, loaded
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *args],
        cwd=graph_file.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_solve_prints_a_valid_schedule(graph_file: Path) -> None:
    done = run_cli("solve", "graph.json", "--budget", "6000", cwd=graph_file.parent)
    schedule = Schedule.from_json(done.stdout)
    graph = TrainingGraph.from_json(graph_file.read_text(encoding="utf-8"))
    verdict = simulate(graph, schedule.forward, schedule.backward)
    assert verdict.peak_bytes == schedule.peak_bytes <= schedule.budget_bytes == 6000
    assert "solving 12 ops" in done.stderr


def test_solve_writes_the_file_and_prints_a_summary(graph_file: Path) -> None:
    done = run_cli("solve", "graph.json", "--budget", "6kB", "-o", "schedule.json", cwd=graph_file.parent)
    schedule = Schedule.from_json((graph_file.parent / "schedule.json").read_text(encoding="utf-8"))
    assert schedule.budget_bytes == 6000
    assert "peak" in done.stdout
    done = run_cli("solve", "graph.json", "--budget", "6kB", "-o", "s.json", "--json", cwd=graph_file.parent)
    assert json.loads(done.stdout)["peak_bytes"] == schedule.peak_bytes


def test_a_schedule_as_json_has_a_schema_and_is_a_schedule_file_too(graph_file: Path) -> None:
    done = run_cli("solve", "graph.json", "--budget", "6kB", "--json", cwd=graph_file.parent)
    assert json.loads(done.stdout)["schema"] == "rematerialize.schedule/1"
    plain = run_cli("solve", "graph.json", "--budget", "6kB", cwd=graph_file.parent)
    assert Schedule.from_json(done.stdout) == Schedule.from_json(plain.stdout)


def test_both_names_of_the_budget_mean_the_same_for_a_graph(graph_file: Path) -> None:
    said = [
        run_cli("solve", "graph.json", name, "6000", cwd=graph_file.parent).stdout
        for name in ("--budget", "--activation-budget")
    ]
    assert said[0] == said[1]
    run_cli("solve", "graph.json", "--budget", "1", "--activation-budget", "1", cwd=graph_file.parent, code=2)


def test_a_percentage_is_of_the_store_all_peak(graph_file: Path) -> None:
    done = run_cli("solve", "graph.json", "--budget", "100%", cwd=graph_file.parent)
    schedule = Schedule.from_json(done.stdout)
    assert schedule.peak_bytes == schedule.budget_bytes
    assert schedule.time_s == 12.0


def test_the_minimum_that_exit_code_3_names_is_exact(graph_file: Path) -> None:
    done = run_cli("solve", "graph.json", "--budget", "10", cwd=graph_file.parent, code=3)
    answer = json.loads(done.stdout)
    minimum = answer["minimum_bytes"]
    assert str(minimum) in the_error(done)
    run_cli("solve", "graph.json", "--budget", str(minimum), cwd=graph_file.parent)
    less = run_cli("solve", "graph.json", "--budget", str(minimum - 1), cwd=graph_file.parent, code=3)
    assert json.loads(less.stdout)["minimum_bytes"] == minimum


@pytest.mark.parametrize("budget", ["0", "-1", "0.5", "8 Gib ibs", "auto", "nan", "200%"])
def test_a_bad_budget_is_exit_code_2(budget: str, graph_file: Path) -> None:
    done = run_cli("solve", "graph.json", f"--budget={budget}", cwd=graph_file.parent, code=2)
    assert the_error(done).startswith(f"--budget '{budget}' ")


def test_an_unknown_solver_is_named_with_those_known(graph_file: Path) -> None:
    done = run_cli("solve", "graph.json", "--budget", "30%", "--solver", "magic", cwd=graph_file.parent, code=2)
    assert "'magic'" in the_error(done)
    assert "auto" in the_error(done)
    done = run_cli("solve", "graph.json", "--budget", "30%", "--solver", "descnt", cwd=graph_file.parent, code=2)
    assert the_error(done).endswith("; did you mean 'descent'?")


GOOD = a_graph(2).to_json()
BAD_FILES = {
    "empty": b"",
    "truncated": GOOD[: len(GOOD) // 2].encode(),
    "not JSON": b"budget: 8GiB",
    "not text": bytes(range(256)),
    "a list": b"[]",
    "a number": b"3",
    "foreign": b'{"nodes": []}',
    "a schedule": b'{"format": "rematerialize.schedule/1"}',
    "a later version": GOOD.replace("graph/1", "graph/2").encode(),
    "deeply nested": b"[" * 200_000,
    "unknown storage": GOOD.replace('"a0"', '"zz"', 1).encode(),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_exit_code_2_and_writes_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "graph.json").write_bytes(content)
    done = run_cli("solve", "graph.json", "--budget", "1GiB", "-o", "out.json", cwd=tmp_path, code=2)
    assert the_error(done).startswith("graph.json can't be solved: ")
    assert done.stdout == ""
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("args", [("missing.json",), (".",), ("graph.json", "-o", "no/such/folder.json")])
def test_a_path_that_does_not_work_is_named(args: tuple[str, ...], graph_file: Path) -> None:
    done = run_cli("solve", *args, "--budget", "1GiB", cwd=graph_file.parent, code=2)
    assert args[-1] in the_error(done)


def test_a_graph_file_that_is_not_there_is_told_its_closest(graph_file: Path) -> None:
    done = run_cli("solve", "grpah.json", "--budget", "1GiB", cwd=graph_file.parent, code=2)
    assert the_error(done).endswith("there is no file grpah.json; did you mean 'graph.json'?")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run_cli("solve", "missing.json", "--budget", "1GiB", "--debug", cwd=tmp_path, code=1)
    assert "Traceback" in done.stderr


def test_a_reader_that_goes_away_is_no_traceback(graph_file: Path) -> None:
    graph_file.write_text(a_graph(20_000).to_json(), encoding="utf-8")  # more than a pipe holds
    command = f"{sys.executable} -m rematerialize solve graph.json --budget 100% --solver store_all | head -c 10"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=graph_file.parent,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_an_interrupt_is_one_line_and_exit_code_130(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ndef make():\n    print('ready', flush=True)\n    time.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "rematerialize", "plan", "slow:make", "--budget", "1GiB"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        # A shell ignores interrupts for what it runs in the background, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr.read() == "rematerialize: interrupted\n"


@pytest.mark.parametrize(
    ("factory", "budgets", "says"),
    [
        ("mine:make", (), "got none"),
        ("mine:make", ("--budget", "1GiB", "--activation-budget", "30%"), "got both"),
        ("mine:make", ("--activation-budget", "0.3"), "has no unit"),
        ("mine:make", ("--activation-budget", "auto"), "'auto'"),
        ("mine", ("--budget", "1GiB"), "PKG.MOD:FACTORY"),
        ("mine:", ("--budget", "1GiB"), "PKG.MOD:FACTORY"),
        (".:make", ("--budget", "1GiB"), "PKG.MOD:FACTORY"),
        ("mine:make:again", ("--budget", "1GiB"), "PKG.MOD:FACTORY"),
        ("absent.module:make", ("--budget", "1GiB"), "no module named 'absent'"),
        ("zo:gpt", ("--budget", "1GiB"), "did you mean 'zoo:gpt'?"),
        ("mine:make", ("--budget", "1GiB", "--cost-cache", "mine.py"), "'mine.py' is a file"),
        ("mine:absent", ("--budget", "1GiB"), "has no 'absent'"),
        ("mine:number", ("--budget", "1GiB"), "must be a function"),
        ("mine:alone", ("--budget", "1GiB"), "must return (model, example_inputs)"),
        ("mine:fails", ("--budget", "1GiB"), "the factory mine:fails raised KeyError: 'no such dataset'"),
        ("broken:make", ("--budget", "1GiB"), "RuntimeError: half a module"),
        ("lacking:make", ("--budget", "1GiB"), "No module named 'not_installed_anywhere'"),
    ],
)
def test_a_plan_that_cannot_start_says_whose_fault_it_is(
    factory: str, budgets: tuple[str, ...], says: str, project: Path
) -> None:
    done = run_cli("plan", factory, *budgets, cwd=project, code=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("rematerialize: error: ")
    assert says in last
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_factorys_own_failure_names_its_line(project: Path) -> None:
    done = run_cli("plan", "mine:fails", "--budget", "1GiB", cwd=project, code=2)
    line = 1 + (project / "mine.py").read_text().splitlines().index('    raise KeyError("no such dataset")')
    assert f"mine.py, line {line})" in done.stderr


def test_plan_prints_the_table_alone_on_stdout(project: Path) -> None:
    done = run_cli("plan", "mine:make", "--activation-budget", "50%", "-o", "plan.json", cwd=project)
    assert "this plan" in done.stdout
    assert "prints" not in done.stdout
    assert "a factory that prints" in done.stderr
    assert json.loads((project / "plan.json").read_text(encoding="utf-8"))


def test_plan_as_json_is_json_alone(project: Path) -> None:
    done = run_cli("plan", "mine:make", "--activation-budget", "50%", "--json", cwd=project)
    answer = json.loads(done.stdout)
    assert answer["peak_bytes"] <= answer["budget_bytes"]


def test_a_plan_that_does_not_fit_names_the_exact_minimum(project: Path) -> None:
    done = run_cli("plan", "mine:make", "--activation-budget", "1B", cwd=project, code=3)
    minimum = json.loads(done.stdout)["minimum_bytes"]
    assert str(minimum) in done.stderr.splitlines()[-1]


def test_a_step_that_cannot_be_captured_is_exit_code_5_and_names_the_line(project: Path) -> None:
    done = run_cli("plan", "mine:branches", "--activation-budget", "50%", cwd=project, code=5)
    assert "mine.py" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_with_what_could_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "graph.json").write_text(a_graph().to_json(), encoding="utf-8")
    done = run_cli("solve", "graph.json", "--budget", "100%", "-o", "/dev/full", "--force", cwd=tmp_path, code=2)
    assert the_error(done) == "can't write /dev/full: No space left on device"


def test_memory_that_ran_out_is_no_bug_of_ours(capfd: pytest.CaptureFixture[str]) -> None:
    words = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
    for error, says in (
        (RuntimeError(words), "memory ran out ([enforce fail"),
        (MemoryError(), "memory ran out (MemoryError): make the inputs smaller, or name a --device"),
        (OSError(errno.ENOSPC, "No space left on device"), "can't write the output: No space left on device"),
    ):
        with pytest.raises(typer.Exit) as left, one_line_errors(debug=False):
            raise error
        assert left.value.exit_code == 2
        assert says in capfd.readouterr().err


def test_the_collector_rests_while_torch_is_imported_and_only_then() -> None:
    program = textwrap.dedent("""
        import gc, sys
        from rematerialize.cli.targets import uncollected_imports
        try:
            with uncollected_imports():
                assert not gc.isenabled()
                raise RuntimeError
        except RuntimeError:
            assert gc.isenabled() and gc.get_freeze_count() == 0
        with uncollected_imports():
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() > 0
        gc.unfreeze()
        sys.modules["torch"] = gc
        with uncollected_imports():
            assert gc.isenabled()
        assert gc.get_freeze_count() == 0
    """)
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": str(ROOT)})
