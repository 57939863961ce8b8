"""The graphs on which solvers are judged, by name: captured ones from files, synthetic ones built when asked for.

    from benchmarks.solver.suite import held_out, large, small, synthetic
    graph = small()["unet"]

The files are written by `benchmarks/solver/capture.py`; reading them needs no torch.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.solver import graphs
from rematerialize.ir import TrainingGraph

DATA = Path(__file__).parent / "graphs_data"


class Graphs(Mapping[str, TrainingGraph]):
    """Names to graphs; each is made when it is asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], TrainingGraph]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> TrainingGraph:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def read(path: Path) -> TrainingGraph:
    """Read and verify one graph file, compressed or not."""
    data = path.read_bytes()
    return TrainingGraph.from_json(gzip.decompress(data) if path.suffix == ".gz" else data)


def write(graph: TrainingGraph, path: Path) -> None:
    """Write one compressed graph file; equal graphs give equal bytes."""
    text = json.dumps(graph.to_dict(), separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def _files(suite: str) -> Graphs:
    def maker(path: Path) -> Callable[[], TrainingGraph]:
        return lambda: read(path)

    return Graphs(
        {path.name.removesuffix(".json.gz"): maker(path) for path in sorted((DATA / suite).glob("*.json.gz"))}
    )


def small() -> Graphs:
    """Captured from real models, at most 300 ops each: for judging the quality of schedules."""
    return _files("small")


def held_out() -> Graphs:
    """Of the same kinds as the small ones, in other sizes: for judging what was tuned on those."""
    return _files("held_out")


def large() -> Graphs:
    """Captured from real models at their real depth: for judging speed and quality together."""
    return _files("large")


def synthetic() -> Graphs:
    """Graphs of about 1,000, 10,000 and 100,000 ops in four shapes: for judging how a solver scales."""
    makers: dict[str, Callable[[], TrainingGraph]] = {}
    for label, ops in (("1k", 1_000), ("10k", 10_000), ("100k", 100_000)):
        for shape, build in graphs.SHAPES.items():
            makers[f"{shape}-{label}"] = _sized(build, ops)
    return Graphs(makers)


def find(name: str) -> TrainingGraph:
    """Return the graph of a file, or of a name in any suite: captured ones first, then those of `graphs.py`.

    Raises
    ------
    KeyError
        If it is neither.
    """
    if Path(name).is_file():
        return read(Path(name))
    suites = (small(), held_out(), large(), synthetic(), Graphs(graphs.SUITE))
    for suite in suites:
        if name in suite:
            return suite[name]
    raise KeyError(f"{name}: neither a file nor one of {', '.join(name for suite in suites for name in suite)}")


def _sized(build: Callable[[int], TrainingGraph], ops: int) -> Callable[[], TrainingGraph]:
    return lambda: build(ops)
