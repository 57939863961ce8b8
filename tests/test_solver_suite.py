"""The graph files on which solvers are judged: they load, they are what they say, they name no machine."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from benchmarks.solver.capture import captured
from benchmarks.solver.graphs import SHAPES, random_dag
from benchmarks.solver.held_out import HELD_OUT
from benchmarks.solver.models import LARGE, SMALL
from benchmarks.solver.suite import DATA, find, held_out, large, read, small, synthetic, write
from rematerialize.ir import TrainingGraph
from rematerialize.simulate import simulate

FILES = sorted(DATA.glob("*/*.json.gz"))


def store_all(graph: TrainingGraph) -> None:
    forward = [op.name for op in graph.ops if op.phase == "forward"]
    backward = [op.name for op in graph.ops if op.phase == "backward"]
    assert simulate(graph, forward, backward).peak_bytes > 0


def test_there_is_one_file_per_model() -> None:
    assert set(small()) == set(SMALL)
    assert set(held_out()) == set(HELD_OUT)
    assert set(large()) == set(LARGE)


def test_all_files_together_stay_small() -> None:
    assert sum(path.stat().st_size for path in FILES) < 4_000_000


@pytest.mark.parametrize("name", sorted({**SMALL, **HELD_OUT}))
def test_a_small_graph_has_at_most_300_ops_and_can_be_replayed(name: str) -> None:
    graph = find(name)
    assert len(graph.ops) <= 300
    assert graph.gradients
    store_all(graph)


@pytest.mark.parametrize("name", sorted(LARGE))
def test_a_large_graph_loads(name: str) -> None:
    assert len(large()[name].ops) > 300


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_sources_name_a_file_and_a_line_and_no_folder(path: Path) -> None:
    sources = {op.source for op in read(path).ops}
    assert all(re.fullmatch(r"(\w+\.py:\d+)?", source) for source in sources)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_writing_again_what_was_read_gives_the_same_text(path: Path, tmp_path: Path) -> None:
    write(read(path), tmp_path / path.name)
    assert gzip.decompress((tmp_path / path.name).read_bytes()) == gzip.decompress(path.read_bytes())


@pytest.mark.parametrize("name", ["gpt2-block", "uneven-chain", "random-near"])
def test_a_capture_repeats(name: str) -> None:
    assert captured(SMALL[name]) == captured(SMALL[name])


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("ops", [1_000, 10_000])
def test_a_synthetic_step_has_about_the_size_asked_for(shape: str, ops: int) -> None:
    graph = SHAPES[shape](ops)
    assert 0.8 * ops <= len(graph.ops) <= 1.2 * ops
    store_all(graph)


def test_synthetic_graphs_come_by_name() -> None:
    assert set(synthetic()) == {f"{shape}-{label}" for shape in SHAPES for label in ("1k", "10k", "100k")}
    assert len(synthetic()["random-1k"].ops) > 500


def test_a_graph_is_found_by_name_or_by_file() -> None:
    assert find("unet") == small()["unet"] == find(str(DATA / "small" / "unet.json.gz"))
    assert find("chain-1k") == synthetic()["chain-1k"]
    assert find("gpt-2").ops
    with pytest.raises(KeyError, match="no-such"):
        find("no-such")


def test_a_random_graph_follows_from_its_seed() -> None:
    assert random_dag(60, seed=5) == random_dag(60, seed=5)
    assert random_dag(60, seed=5) != random_dag(60, seed=6)
    for seed in range(20):
        store_all(random_dag(5 + seed, seed=seed))
