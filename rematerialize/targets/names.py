"""TARGET: which of four kinds it is, checked as far as that needs no import of torch.

``pkg.mod:factory``, ``path/to/file.py:factory``, ``hf:config.json`` or its folder, and ``zoo:gpt`` (``zoo:gpt@bench``
for the larger scale). A factory takes nothing and returns a model, or a model and its example inputs.
"""

from __future__ import annotations

import ast
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rematerialize.errors import TargetError, closest_file, did_you_mean
from rematerialize.zoo import ENTRIES, ModelSpec, Scale
from rematerialize.zoo.spec import SCALES

Kind = Literal["module", "file", "hf", "zoo"]
_EXPECTED = "PKG.MOD:FACTORY, FILE.py:FACTORY, hf:CONFIG.json or zoo:NAME"


@dataclass(frozen=True, slots=True)
class TargetName:
    """A target as it was named.

    Attributes
    ----------
    text : str
        As typed.
    kind : {"module", "file", "hf", "zoo"}
    where : str
        The module, the file, the configuration, or the zoo's name.
    function : str
        The factory, for "module" and "file".
    scale : {"test", "bench"}
        For "zoo".
    """

    text: str
    kind: Kind
    where: str
    function: str = ""
    scale: Scale = "test"


def parse_target(text: str) -> TargetName:
    """Read a TARGET.

    Raises
    ------
    TargetError
        Says what was expected, and the closest match where there is one.
    """
    scheme, colon, rest = text.partition(":")
    if scheme == "zoo" and colon:
        return _zoo(text, rest)
    if scheme == "hf" and colon:
        return TargetName(text, "hf", str(_existing(text, rest or ".", "a transformers config.json or its folder")))
    where, colon, function = text.rpartition(":")
    if text.endswith(".py") or where.endswith(".py"):
        path = _existing(text, where if where.endswith(".py") else text, "a Python file")
        if not function or not where.endswith(".py"):
            example = _example(path)
            raise TargetError(f"expected a factory as FILE.py:FACTORY, got {text!r}; write for example {example}")
        return TargetName(text, "file", str(path), function)
    if not colon or ":" in where or "" in where.split(".") or not function:
        raise TargetError(f"expected a target as {_EXPECTED}, got {text!r}{_meant(text)}")
    return TargetName(text, "module", where, function)


def _meant(text: str) -> str:
    """What a name alone may mean: a file that is here, or a model of the zoo."""
    file = Path(f"{text}.py")
    with contextlib.suppress(OSError):  # a name too long for a file
        if text and file.is_file():
            return f"; did you mean {_example(file)!r}?"
    near = did_you_mean(text, ENTRIES, {name: f"zoo:{name}" for name in ENTRIES})
    return near or "; write for example models:make"


def _example(path: Path) -> str:
    """A target in a file: `make`, or the first function that it defines and that takes nothing."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        body = []
    found = [node.name for node in body if isinstance(node, ast.FunctionDef) and takes_nothing(node.args)]
    return f"{path}:{'make' if 'make' in found else next(iter(found), 'FACTORY')}"


def takes_nothing(parameters: ast.arguments) -> bool:
    """Whether a function with these parameters can be called without arguments."""
    positional = len(parameters.posonlyargs) + len(parameters.args)
    return positional == len(parameters.defaults) and None not in parameters.kw_defaults


def zoo_entry(name: str) -> ModelSpec:
    """Look a model of the zoo up.

    Raises
    ------
    TargetError
        If there is none of that name; names the closest.
    """
    if name not in ENTRIES:
        near = did_you_mean(name, ENTRIES)
        raise TargetError(f"expected the name of a model of the zoo, got {name!r}{near or ''} (rematerialize zoo)")
    return ENTRIES[name]


def _zoo(text: str, rest: str) -> TargetName:
    name, at, scale = rest.partition("@")
    spec = zoo_entry(name)
    if at and scale not in SCALES:
        near = did_you_mean(scale, SCALES)
        raise TargetError(f"expected one of {', '.join(SCALES)} behind the @, got {scale!r} in {text!r}{near}")
    if package := spec.missing():
        raise TargetError(
            f"{text} needs the package {package}, which isn't installed: pip install rematerialize[models]"
        )
    return TargetName(text, "zoo", name, scale="bench" if scale == "bench" else "test")


def _existing(text: str, where: str, what: str) -> Path:
    path = Path(where).expanduser()
    if path.is_dir() and what.startswith("a transformers"):
        path /= "config.json"
    if path.is_file():
        return path
    near = closest_file(path, f"*{path.suffix}")
    raise TargetError(f"expected {what} in the target {text!r}, but there is no file {path}{near}")
