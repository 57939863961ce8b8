"""What a comparison records, as frozen data that goes to JSON and back, and the verdicts on it."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.records import rounded

FORMAT = "rematerialize.comparison/1"
Status = Literal["ok", "incorrect", "infeasible", "timeout", "error"]
OURS = "ours "  # names of our contestants begin so; peers' don't
NOISE_FLOOR = 0.02  # below two percent, two identical steps differ, too
DIGITS = 5  # of recorded figures


@dataclass(frozen=True, slots=True)
class Cell:
    """One contestant on one model; figures are None where it didn't run.

    Ratios are over eager's; `time_ratio` is the median of per-round ratios, with its interquartile
    range. `step_s` holds one time per round, the same rounds for all cells of the model.
    """

    contestant: str
    status: Status
    detail: str = ""
    peak_bytes: int | None = None
    peak_ratio: float | None = None
    time_ratio: float | None = None
    time_ratio_iqr: float | None = None
    prepare_s: float | None = None
    step_s: tuple[float, ...] = ()

    @property
    def is_ours(self) -> bool:
        return self.contestant.startswith(OURS)

    @property
    def ran(self) -> bool:
        return bool(self.step_s)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A peer against the fastest of our correct cells whose peak isn't above the peer's.

    `ratio` is the median over rounds of our time over the peer's, `noise` half its notch: the
    difference must be larger to count.
    """

    peer: str
    peer_status: Status
    ours: str | None
    ratio: float | None
    noise: float | None
    verdict: Literal["faster", "equal", "slower", "nothing fits"]


@dataclass(frozen=True, slots=True)
class ModelResult:
    """All cells of one model, from one interleaved run."""

    model: str
    eager_peak_bytes: int
    eager_s: float
    gradient_bytes: int
    rounds: int
    cells: tuple[Cell, ...]

    def verdicts(self) -> list[Verdict]:
        """Judge every peer that ran, an incorrect one, too: its status says so."""
        peers = [c for c in self.cells if not c.is_ours and c.ran and c.contestant != "eager"]
        return [_judge(peer, self.cells) for peer in peers]

    def lowest_peak(self) -> bool | None:
        """Return whether our smallest peak lies below every peer's; None without both."""
        ours = [c.peak_bytes for c in self.cells if c.is_ours and c.status == "ok" and c.peak_bytes]
        peers = [c.peak_bytes for c in self.cells if not c.is_ours and c.peak_bytes]
        return min(ours) < min(peers) if ours and peers else None


def _judge(peer: Cell, cells: tuple[Cell, ...]) -> Verdict:
    assert peer.peak_bytes is not None
    fitting = [
        cell
        for cell in cells
        if cell.is_ours and cell.ran and cell.status == "ok" and (cell.peak_bytes or 0) <= peer.peak_bytes
    ]
    if not fitting:
        return Verdict(peer.contestant, peer.status, None, None, None, "nothing fits")
    best = min(fitting, key=lambda cell: cell.time_ratio or 0.0)
    ratios = [a / b for a, b in zip(best.step_s, peer.step_s, strict=True)]
    ratio = statistics.median(ratios)
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratio] * 3
    # McGill, Tukey, Larsen (1978): medians whose notches (1.57 IQR / sqrt n) don't meet differ.
    noise = max(NOISE_FLOOR, 1.57 * (quartiles[2] - quartiles[0]) / len(ratios) ** 0.5)
    verdict: Literal["faster", "equal", "slower"] = "equal"
    if abs(ratio - 1) > noise:
        verdict = "slower" if ratio > 1 else "faster"
    return Verdict(peer.contestant, peer.status, best.contestant, ratio, noise, verdict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run over several models, and everything needed to repeat it."""

    command: str
    commit: str
    date: str
    device: str
    threads: int
    versions: dict[str, str]
    seed: int
    scale: str
    results: tuple[ModelResult, ...]

    def save(self, path: Path) -> None:
        data = rounded({"format": FORMAT, **dataclasses.asdict(self)}, DIGITS)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Comparison:
        """Read a saved comparison.

        Raises
        ------
        ValueError
            When the file isn't one.
        """
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"{path.name} isn't a {FORMAT} file")
        results = tuple(_model_result(result) for result in data.pop("results"))
        return cls(results=results, **data)


def _model_result(data: dict[str, Any]) -> ModelResult:
    cells = (Cell(**{**cell, "step_s": tuple(cell["step_s"])}) for cell in data.pop("cells"))
    return ModelResult(cells=tuple(cells), **data)
