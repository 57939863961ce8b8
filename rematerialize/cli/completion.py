"""What a shell offers behind TARGET and the options whose values are known. None of it imports torch.

Shells ask through typer, which calls a function with what is typed so far. Bash splits words at colons and replaces
only what stands behind the last one, so that `answering_bash` puts ``zoo`` ``:`` ``gp`` together again before typer
reads them, and lets answers begin behind the colon, with their spaces escaped.
"""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from pathlib import Path

Completer = Callable[[str], list[str]]

_ASKED, _LARGEST_FILE = "_REMATERIALIZE_COMPLETE", 500_000
_OPTIMIZERS = ("adagrad", "adam", "adamw", "rmsprop", "sgd")  # others are accepted, too; their list needs torch


@contextlib.contextmanager
def answering_bash(env: MutableMapping[str, str]) -> Iterator[None]:
    """Where bash asks for words, by these variables: undo its splitting, and answer in its parts."""
    if env.get(_ASKED) != "complete_bash" or not env.get("COMP_CWORD", "").isdigit():
        yield
        return
    words, at = joined_words(env.get("COMP_WORDS", "").split("\n"), int(env["COMP_CWORD"]))
    env["COMP_WORDS"], env["COMP_CWORD"] = "\n".join(words), str(at)
    kept = words[at].rfind(":") + 1 if at < len(words) else 0
    answers = io.StringIO()
    try:
        with contextlib.redirect_stdout(answers):
            yield
    finally:  # typer exits once it has answered
        print("\n".join(answer[kept:].replace(" ", "\\ ") for answer in answers.getvalue().splitlines()))


def joined_words(words: list[str], at: int) -> tuple[list[str], int]:
    """Words that bash split at colons, and which of them is being typed.

    >>> joined_words(["rematerialize", "plan", "zoo", ":", "gp"], 4)
    (['rematerialize', 'plan', 'zoo:gp'], 2)
    """
    joined: list[str] = []
    place = at
    for position, word in enumerate(words):
        if joined and (word == ":" or joined[-1].endswith(":")):
            joined[-1] += word
        else:
            joined.append(word)
        if position == at:
            place = len(joined) - 1
    return joined, place


def one_of(names: Callable[[], Iterable[str]]) -> Completer:
    """Complete one of some names, which are only asked for then."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def targets(incomplete: str) -> list[str]:
    """Models of the zoo, configurations, and factories in the Python files of the folder that is typed."""
    from rematerialize.zoo import ENTRIES

    known = [f"zoo:{name}" for name in ENTRIES]
    return [*known, *_factories(incomplete), *_configurations(incomplete)]


def devices() -> list[str]:
    """Those that can be here, and those of the table."""
    from rematerialize.device_table import DEVICES

    return ["cpu", "cuda", *DEVICES]


def solvers() -> list[str]:
    """All of them, and auto."""
    from rematerialize import solve

    return ["auto", *solve.solvers()]


def dtypes() -> list[str]:
    """Floating types."""
    from rematerialize.targets.specs import FLOATS

    return list(FLOATS)


def optimizers() -> list[str]:
    """The usual ones."""
    return list(_OPTIMIZERS)


def _factories(typed: str) -> list[str]:
    """Functions that take nothing, read from the files' text."""
    from rematerialize.targets.names import takes_nothing

    found = []
    for path in _beside(typed.partition(".py:")[0], "*.py"):
        try:
            body = ast.parse(path.read_bytes()).body if path.stat().st_size < _LARGEST_FILE else []
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name[0] != "_" and takes_nothing(node.args):
                found.append(f"{path}:{node.name}")
    return found


def _configurations(typed: str) -> list[str]:
    return [f"hf:{path}" for path in _beside(typed.removeprefix("hf:"), "*.json")] if typed.startswith("hf:") else []


def _beside(typed: str, pattern: str) -> list[Path]:
    """The files in the folder that is typed whose names begin like what is typed."""
    folder, start = Path(typed.rpartition("/")[0] or ("/" if typed.startswith("/") else ".")), typed.rpartition("/")[2]
    try:
        return sorted(path for path in folder.glob(pattern) if path.name.startswith(start))
    except OSError:
        return []
