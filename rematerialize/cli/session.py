"""What every command that plans does first: load the target, choose where costs are kept, show progress."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rematerialize.cli.console import Console
from rematerialize.cli.targets import load_target

if TYPE_CHECKING:
    from rematerialize.plans import Plan
    from rematerialize.targets.load import Target


@dataclass(frozen=True, slots=True)
class Session:
    """A loaded target, and the arguments that the library's functions take for it.

    Attributes
    ----------
    target : Target
    options : dict
        ``device``, ``cost_cache`` and ``progress`` for ``plan``, ``frontier`` and ``profile``.
    """

    target: Target
    options: dict[str, Any]

    @property
    def device(self) -> str | None:
        """The device of the table that costs are computed for; None where they are measured."""
        return None if self.target.spec is None else self.target.spec.name

    @property
    def costs(self) -> str:
        """Where the figures come from, for readers."""
        if self.device is not None:
            return f"computed for {self.device}"
        from rematerialize.cost_cache import device_name
        from rematerialize.prepare import home_of

        return f"measured on {device_name(home_of(self.target.model))}"

    def named(self, *plans: Plan) -> tuple[Plan, ...]:
        """Plans that say which target they are for, in the words of the command line."""
        return tuple(replace(plan, origin=replace(plan.origin, target=self.target.name)) for plan in plans)


def open_session(
    console: Console,
    target: str,
    specs: Sequence[str] | None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    cost_cache: Path | None = None,
    steps: str = "",
) -> Session:
    """Load a target for a command; ``steps`` names the command if it runs real steps."""
    loaded = load_target(target, specs, dtype=dtype, device=device, steps=steps)
    with user_output():
        from rematerialize.cost_cache import default_folder

        options = {
            "device": None if loaded.spec is None else loaded.spec.name,
            "cost_cache": cost_cache or default_folder(),
            "progress": console.stages(),
        }
    return Session(loaded, options)


@contextlib.contextmanager
def user_output() -> Iterator[None]:
    """What a model prints must not mix with our data."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
