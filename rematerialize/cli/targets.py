"""TARGET, SPEC, ``--dtype`` and ``--device`` to a model with example inputs."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rematerialize.errors import TargetError
from rematerialize.garbage import uncollected
from rematerialize.targets.names import parse_target
from rematerialize.targets.specs import parse_dtype, parse_specs

if TYPE_CHECKING:
    from rematerialize.targets.load import Target


def check_target(target: str, specs: Sequence[str] | None = None, dtype: str | None = None) -> None:
    """Refuse what can't be a target, a spec or a type, before anything slow is imported."""
    parse_target(target)
    parse_specs(specs or ())
    if dtype is not None:
        parse_dtype(dtype, "for --dtype", floating=True)


def load_target(
    target: str,
    specs: Sequence[str] | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    batch: int | None = None,
    batch_dim: int = 0,
    fake: bool = False,
    per_block: bool = False,
    steps: str = "",
) -> Target:
    """Make what a command line names; what the target prints goes to stderr.

    Parameters
    ----------
    steps : str
        The command that runs real steps, if one does: refuse devices that aren't here.

    The others are those of `rematerialize.targets.load.load`.

    Raises
    ------
    TargetError
        One line: what was expected, and the closest match.
    """
    check_target(target, specs, dtype)
    with contextlib.redirect_stdout(sys.stderr):
        with uncollected_imports():
            from rematerialize.targets.devices import find_device
            from rematerialize.targets.load import load

        if steps and (spec := find_device(device).spec) is not None:
            raise TargetError(f"{steps} runs steps, and {spec.name} isn't here: give --device cpu or cuda")
        return load(
            target,
            specs or (),
            dtype=dtype,
            device=device,
            batch=batch,
            batch_dim=batch_dim,
            fake=fake,
            per_block=per_block,
        )


@contextlib.contextmanager
def uncollected_imports() -> Iterator[None]:
    """Import torch without the garbage collector, and hide from it for good what was imported.

    Modules stay until the process ends, and torch's are so many objects that looking at them again and again took 0.4 s
    of the imports and 0.3 s of a plan. Where torch is imported already the process isn't a command's alone: nothing is
    done to it.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    with uncollected():
        yield
        gc.freeze()
