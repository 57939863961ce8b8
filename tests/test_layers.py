"""The package's layers: imports go down, equals don't meet, and torch stays where it belongs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rematerialize"

# The one list of layers; docs/architecture.md repeats it for readers and a test below compares the two.
LAYERS = {
    "errors": 0,
    "garbage": 0,
    "version": 0,
    "device_table": 1,
    "units": 1,
    "zoo/": 1,
    "ir": 1,
    "schedule": 2,
    "python_code": 2,
    "torch_private": 2,
    "budget": 2,
    "drivers": 3,
    "harness": 3,
    "torch_budget": 4,
    "simulate": 3,
    "python_state": 3,
    "capture/": 4,
    "solve/": 4,
    "cost": 5,
    "cost_cache": 5,
    "emit": 5,
    "tangents": 5,
    "report/": 5,
    "synthetic": 5,
    "synthetic_integers": 4,
    "timing": 6,
    "views": 5,
    "measure": 7,
    "runtime": 6,
    "signature": 6,
    "prepare": 8,
    "analytic": 9,
    "call_cost": 11,
    "plan_file": 2,
    "plans": 9,
    "targets/": 10,
    "wrapper": 10,
    "api": 11,
    "__init__": 14,
    "doctor": 12,
    "trial": 12,
    "compare": 13,
    "peers": 13,
    "profiling": 13,
    "batches": 13,
    "verify": 13,
    "cli/": 14,
    "__main__": 15,
}
NEVER_TORCH = (
    "errors",
    "device_table",
    "units",
    "version",
    "ir",
    "schedule",
    "simulate",
    "solve/",
    "report/",
    "plan_file",
    "plans",
    "cli/",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """Return the row of LAYERS that a file belongs to: its folder, or its own name."""
    relative = path.relative_to(PACKAGE)
    return f"{relative.parts[0]}/" if len(relative.parts) > 1 else relative.stem


def imported_modules(path: Path) -> list[tuple[str, int]]:
    """Return (dotted name, line) of every import anywhere in a file, `if TYPE_CHECKING` included."""
    found: list[tuple[str, int]] = []
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def parts_imported(path: Path) -> list[tuple[str, int]]:
    """Return (row of LAYERS, line) of every import of our own package."""
    found: list[tuple[str, int]] = []
    for name, line in imported_modules(path):
        first, *rest = name.split(".")
        if first != "rematerialize":
            continue
        target = rest[0] if rest else "__init__"
        if (PACKAGE / target).is_dir():
            target += "/"
        elif not (PACKAGE / f"{target}.py").exists():
            target = "__init__"  # `from rematerialize import Plan`
        found.append((target, line))
    return found


def file_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_every_file_has_a_layer(path: Path) -> None:
    assert part_of(path) in LAYERS, "give it a number in LAYERS and a line in docs/architecture.md"


def test_every_layer_stands_for_something_that_exists() -> None:
    assert set(LAYERS) == {part_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_imports_go_only_to_a_lower_layer(path: Path) -> None:
    own = part_of(path)
    wrong = [
        f"line {line}: {own} ({LAYERS[own]}) imports {target} ({LAYERS[target]})"
        for target, line in parts_imported(path)
        if LAYERS[target] >= LAYERS[own] and not (target == own and own.endswith("/"))
    ]
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_private_torch_appears_in_one_file(path: Path) -> None:
    if part_of(path) == "torch_private":
        pytest.skip("the file that isolates it")
    private = re.compile(r"torch(\.\w+)*\._\w+")
    wrong = [f"line {line}: {name}" for name, line in imported_modules(path) if private.match(name)]
    assert not wrong


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) in NEVER_TORCH], ids=file_id)
def test_the_solver_and_what_it_stands_on_never_import_torch(path: Path) -> None:
    wrong = [f"line {line}" for name, line in imported_modules(path) if name.split(".")[0] == "torch"]
    assert not wrong


LIGHT = (
    "rematerialize",
    "rematerialize.cli",
    "rematerialize.cli.commands.devices",
    "rematerialize.device_table",
    "rematerialize.doctor",
    "rematerialize.plans",
    "rematerialize.solve",
    "rematerialize.targets.names",
    "rematerialize.zoo",
)


@pytest.mark.parametrize("module", LIGHT)
def test_importing_the_light_parts_does_not_load_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_package_offers_its_public_names_lazily_and_no_others() -> None:
    import rematerialize

    assert dir(rematerialize) == sorted(rematerialize.__all__)
    assert all(getattr(rematerialize, name) is not None for name in rematerialize.__all__)
    with pytest.raises(AttributeError, match="frobnicate"):
        rematerialize.frobnicate  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_only_the_entrances_know_the_solvers(path: Path) -> None:
    """Neither the judge nor the emitter may lean on how a schedule was found."""
    knows = "solve/" in [target for target, _ in parts_imported(path)]
    assert not knows or part_of(path) in ("solve/", "prepare", "cli/")


def test_the_architecture_page_lists_the_same_layers() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)(?:\.py|(/))` +\| +(\d+) +\|", page, flags=re.MULTILINE)
    assert {name + slash: int(layer) for name, slash, layer in rows} == LAYERS


def test_no_module_hides_a_public_function() -> None:
    """Importing ``rematerialize.x`` sets the attribute x of the package: nothing public may be called so."""
    import rematerialize

    modules = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert not modules & set(rematerialize.__all__)
