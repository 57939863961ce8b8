"""Runs of a benchmark as frozen data that goes to JSON and back: where its figures come from, and a row per subject."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from benchmarks.provenance import Provenance


class Row(Protocol):
    """A frozen dataclass that its own fields, read from JSON, make again; ``FORMAT`` names the kind of file."""

    FORMAT: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self: ...


R = TypeVar("R", bound=Row)


@dataclass(frozen=True, slots=True)
class Record(Generic[R]):
    """A run and its rows."""

    provenance: Provenance
    rows: tuple[R, ...]

    def save(self, path: Path) -> None:
        """Write the record; it must have a row."""
        data = {
            "format": self.rows[0].FORMAT,
            "provenance": dataclasses.asdict(self.provenance),
            "rows": [rounded(dataclasses.asdict(row)) for row in self.rows],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path, kind: type[R]) -> Record[R]:
        """Read a saved record.

        Raises
        ------
        ValueError
            When the file holds something else.
        """
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != kind.FORMAT:
            raise ValueError(f"{path.name} isn't a {kind.FORMAT} file")
        return cls(Provenance(**data["provenance"]), tuple(kind.from_dict(row) for row in data["rows"]))


def resumed(path: Path, kind: type[R], now: Provenance) -> tuple[R, ...]:
    """Return the rows of a file, if they are of the same code, machine and seed."""
    if not path.exists():
        return ()
    old = Record.load(path, kind)
    return old.rows if old.provenance.same_code(now) else ()


def rounded(value: Any, digits: int = 7) -> Any:
    """Round floats to so many digits: more would be noise in the diff."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, list | tuple) else value
