"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rematerialize.cli.completion import devices, dtypes, one_of, optimizers, targets
from rematerialize.cli.errors import UsageError
from rematerialize.errors import closest_file
from rematerialize.units import parse_budget, parse_bytes

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        autocompletion=targets,
        help="What to train: pkg.mod:factory, path/to/file.py:factory, hf:config.json or zoo:NAME. "
        "A factory returns a model, or (model, example inputs).",
    ),
]
SpecOption = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", metavar="SPEC", help="An example input: input_ids=int64[8,2048]. May be repeated."),
]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", metavar="SIZE", help="Peak of all that a step holds: 8GiB, 80% of the device, auto."),
]
ActivationBudgetOption = Annotated[
    str | None,
    typer.Option("--activation-budget", metavar="SIZE", help="Peak of what a step allocates: 512MiB, 30%."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        autocompletion=one_of(devices),
        help='cpu, cuda, or one of a table, "NVIDIA H100 80GB": then costs are computed, not measured.',
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", metavar="NAME", help="Default type: bfloat16, float32.", autocompletion=one_of(dtypes)),
]
OptimizerOption = Annotated[
    str | None,
    typer.Option(
        "--optimizer",
        metavar="NAME",
        help="Count the state of adamw, sgd and so on.",
        autocompletion=one_of(optimizers),
    ),
]
ReserveOption = Annotated[str | None, typer.Option("--reserve", metavar="SIZE", help="Kept free besides.")]
CostCacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cost-cache",
        metavar="FOLDER",
        file_okay=False,
        help="Where measured costs are kept; by default the user's cache.",
    ),
]
MeasureOption = Annotated[bool, typer.Option("--measure", help="Also run real steps, and show what they took.")]
DepthOption = Annotated[
    int, typer.Option("--depth", metavar="N", min=0, help="Names of a module's path that tell rows apart.")
]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", metavar="PATH", help="Write the result here.")]
PrintedOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="PATH", help="Write here what would be printed.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite what -o names.")]


def check_budgets(
    budget: str | None, activation_budget: str | None, *, required: bool = True, otherwise: str = ""
) -> None:
    """Refuse what can't be a budget before anything slow is imported; ``otherwise`` is what could be given instead."""
    if budget is not None and activation_budget is not None:
        raise UsageError("expected one of --budget and --activation-budget, got both; give one of them")
    if required and budget is None and activation_budget is None:
        raise UsageError(f"expected one of --budget and --activation-budget, got none; give one of them{otherwise}")
    if budget is not None:
        parse_budget(budget, name="--budget", allow_auto=True)
    if activation_budget is not None:
        parse_budget(activation_budget, name="--activation-budget")


def check_reserve(reserve: str | None) -> int:
    """The bytes of ``--reserve``, read before anything slow is imported."""
    return 0 if reserve is None else parse_bytes(reserve, name="--reserve")


def check_besides(activation_budget: str | None, reserve: str | None, optimizer: str | None) -> None:
    """Refuse a reserve that can't be read, and one, or an optimizer, where the budget leaves out what is resident."""
    check_reserve(reserve)
    if activation_budget is not None and (reserve is not None or optimizer is not None):
        given = " and ".join(
            name for name, value in (("--optimizer", optimizer), ("--reserve", reserve)) if value is not None
        )
        raise UsageError(
            f"{given} belongs to --budget (all that a step holds), got --activation-budget (what the step allocates): "
            f"give --budget, or leave {given} out"
        )


def check_plan_file(path: Path, command: str) -> None:
    """Refuse a target, a Python file or a path without a file where a plan file is expected."""
    if path.suffix == ".py" or (":" in path.name and not path.exists()):
        raise UsageError(
            f"{command} takes a plan file, got {path}: write one by `rematerialize plan TARGET --activation-budget 50% "
            "-o plan.json`"
        )
    existing_file(path, "a plan file")


def existing_file(path: Path, what: str) -> Path:
    """Refuse a path at which there is no file, naming the closest that is there."""
    if path.is_file():
        return path
    is_folder = " (that is a folder)" if path.is_dir() else ""
    raise UsageError(f"expected {what}, but there is no file {path}{is_folder}{closest_file(path)}")
