"""Is this environment fit to plan and train in? Every part is looked at on its own, so that the broken one is found.

Importing this doesn't import torch: that torch can't be imported is one of the answers.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rematerialize.units import format_bytes

TESTED_TORCH = ((2, 11), (2, 13))  # the first and the last release series that the tests have run on
EXTRAS: Mapping[str, Sequence[str]] = {
    "models": ("transformers", "diffusers", "torch-geometric", "peft"),
    "exact": ("ortools",),
    "plot": ("matplotlib",),
}


@dataclass(frozen=True, slots=True)
class Check:
    """What was found of one part.

    Attributes
    ----------
    name : str
    state : {"ok", "note", "broken"}
        "note" works, but less well than it could; "broken" is essential and doesn't work.
    found : str
        In a few words, the way out included.
    """

    name: str
    state: Literal["ok", "note", "broken"]
    found: str


def examine() -> Iterator[Check]:
    """Yield the checks one by one; the last runs a training step."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    torch = check_torch()
    yield torch
    yield from (check_extra(name, packages) for name, packages in EXTRAS.items())
    if torch.state == "broken":
        return
    for name, check in (("devices", check_devices), ("cost cache", check_cost_cache), ("self-test", check_step)):
        yield _guarded(name, check)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # what it raises is what the doctor was asked for
        return Check(name, "broken", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def check_torch() -> Check:
    """Is it there, and of a release that was tested?"""
    try:
        import torch
    except Exception as error:  # a broken build raises anything
        return Check("torch", "broken", f"can't be imported ({type(error).__name__}: {error}); pip install torch")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    text = f"{torch.__version__} ({build})"
    low, high = ((".".join(map(str, version))) for version in TESTED_TORCH)
    series = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if series < TESTED_TORCH[0]:
        return Check("torch", "broken", f"{text}: older than {low}; pip install 'torch>={low}'")
    if series > TESTED_TORCH[1]:
        return Check("torch", "note", f"{text}: newer than {high}, the last that was tested")
    return Check("torch", "ok", f"{text}; tested are {low} to {high}")


def check_extra(name: str, packages: Sequence[str]) -> Check:
    """Which packages of an extra are installed?"""
    found, missing = [], []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if not missing:
        return Check(f"extra {name}", "ok", ", ".join(found))
    text = f"without {', '.join(missing)}; pip install rematerialize[{name}]"
    return Check(f"extra {name}", "note", f"{', '.join(found)}; {text}" if found else text)


def check_devices() -> Check:
    """The CPU's threads and memory, and every GPU's memory."""
    import torch

    from rematerialize.budget import device_bytes, free_bytes

    places = [("CPU", torch.device("cpu"), f", {torch.get_num_threads()} of {os.cpu_count()} threads")]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        places.append((torch.cuda.get_device_name(index), torch.device("cuda", index), ""))
    texts = [
        f"{name} {format_bytes(device_bytes(place))} ({format_bytes(free_bytes(place))} free){more}"
        for name, place, more in places
    ]
    return Check("devices", "ok", "; ".join(texts) + ("" if len(places) > 1 else "; no GPU"))


def check_cost_cache() -> Check:
    """Where measured costs are kept, and whether they can be."""
    from rematerialize.cost_cache import default_folder

    folder = default_folder()
    files = sorted(folder.glob("costs-*.json")) if folder.is_dir() else []
    size = sum(path.stat().st_size for path in files)
    if not os.access(_nearest(folder), os.W_OK):
        return Check("cost cache", "note", f"{folder} can't be written: every command measures again")
    return Check("cost cache", "ok", f"{folder}: {len(files)} file(s), {format_bytes(size)}")


def _nearest(folder: Path) -> Path:
    """The folder itself, or the innermost one around it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_step() -> Check:
    """Wrap a small network with dropout and compare its step with eager's, bit for bit."""
    import torch
    from torch import nn

    from rematerialize.api import plan, unwrap, wrap
    from rematerialize.harness import Stepper, compare_steps, run_step

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.1))])
        stepper = Stepper(model, (torch.randn(64, 32),), lambda outputs: outputs.square().mean())
        eager = run_step(stepper, seed=1)
        made = plan(model, stepper.inputs, activation_budget="70%")
        wrap(model, plan=made)
        comparison = compare_steps(eager, run_step(stepper, seed=1))
        unwrap(model)
    if not comparison.exact:
        return Check("self-test", "broken", f"a planned step isn't eager's: {comparison.describe()}")
    return Check(
        "self-test", "ok", f"a step with {made.recomputed} recomputed ops has eager's loss and gradients, bit for bit"
    )
