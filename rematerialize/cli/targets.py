"""TARGET to a model and its example inputs."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any

from rematerialize.cli.errors import UsageError, blame


def call_factory(path: str, *, debug: bool) -> tuple[Any, Any]:
    """Import the module of ``pkg.mod:factory`` and call the factory."""
    module_name, _, function_path = path.partition(":")
    if not module_name or not function_path:
        raise UsageError(f"expected a factory as PKG.MOD:FACTORY, got {path!r}; write for example models:make")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    with contextlib.redirect_stdout(sys.stderr):
        with blame(f"importing {module_name} for the factory", debug=debug):
            try:
                found = importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                    raise
                raise UsageError(
                    f"no module named {error.name!r} here ({here}) or installed; check the factory {path!r}"
                ) from None
        for name in function_path.split("."):
            if not hasattr(found, name):
                raise UsageError(f"{module_name} has no {function_path!r}; check the factory {path!r}")
            found = getattr(found, name)
        if not callable(found):
            raise UsageError(f"the factory {path!r} is a {type(found).__name__}; it must be a function")
        with blame(f"the factory {path}", debug=debug):
            made: object = found()
    if not isinstance(made, tuple) or len(made) != 2:
        what = f"{len(made)} values" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise UsageError(f"the factory {path!r} returned {what}; it must return (model, example_inputs)")
    return made
