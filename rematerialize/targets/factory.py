"""The user's own code: modules and files that are imported, factories that are called, and whose errors they are."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from rematerialize.errors import RematerializeError, TargetError, did_you_mean
from rematerialize.targets.names import TargetName
from rematerialize.zoo import ENTRIES

_LISTED = 8  # functions of a file, in an error


@contextlib.contextmanager
def blame(who: str) -> Iterator[None]:
    """Turn an exception of the user's code into one line that says whose it is and where it rose."""
    try:
        yield
    except RematerializeError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        theirs = [frame for frame in frames if "site-packages" not in frame.filename and frame.filename[0] != "<"]
        own = os.path.dirname(os.path.dirname(__file__)) + os.sep
        theirs = [frame for frame in theirs if not frame.filename.startswith(own)]
        where = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
        raise TargetError(f"{who} raised {type(error).__name__}: {error}{where}") from error


def find_factory(name: TargetName) -> Callable[[], Any]:
    """Import what a target of kind "module" or "file" names.

    Raises
    ------
    TargetError
        If there is no such module or function, or importing it raises.
    """
    found: Any = _from_file(Path(name.where)) if name.kind == "file" else _from_module(name)
    for part in name.function.split("."):
        if not hasattr(found, part):
            near = did_you_mean(part, (known for known in dir(found) if callable(getattr(found, known, None))))
            own = f"; it defines {_defined(found)}" if isinstance(found, ModuleType) else ""
            raise TargetError(f"{name.where} has no {name.function!r}{near}{own}; check the factory {name.text!r}")
        found = getattr(found, part)
    if not callable(found) or (hasattr(found, "named_parameters") and not isinstance(found, type)):
        raise TargetError(f"the factory {name.text!r} is {described(found)}; it must be a function")
    factory: Callable[[], Any] = found
    return factory


def described(value: object) -> str:
    """What something is, without an article that its type's name may not go with.

    >>> described(3), described(None)
    ('an object of type int', 'None')
    """
    return "None" if value is None else f"an object of type {type(value).__name__}"


def _defined(module: ModuleType) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    rest = [f"{len(own) - _LISTED} more"] if len(own) > _LISTED else []
    return ", ".join([*own[:_LISTED], *rest]) or "no function"


def _from_module(name: TargetName) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    with blame(f"importing {name.where} for the factory"):
        try:
            return importlib.import_module(name.where)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name.where}.".startswith(f"{error.name}."):
                raise
            near = did_you_mean(error.name, (path.stem for path in Path(here).glob("*.py")))
            near = near or did_you_mean(name.text, (f"zoo:{model}" for model in ENTRIES))
            raise TargetError(
                f"no module named {error.name!r} here ({here}) or installed{near}; check the factory {name.text!r}"
            ) from None


def _from_file(path: Path) -> ModuleType:
    """Import a file as `python path` would see it: what stands beside it can be imported."""
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = path.stem if path.stem not in sys.modules else f"target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    with blame(f"importing {path} for the factory"):
        try:
            spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(name, None)
            raise
    return module
