"""Measured costs on disk: taken over by the next process, never lost by an interrupt, never a reason to fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rematerialize as remat
from rematerialize import cost_cache, measure, timing
from rematerialize.capture import KernelCost
from rematerialize.cost_cache import CostCache, MeasuredCost


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.1))])


def planned(folder: Path) -> remat.Plan:
    return remat.plan(model(), (torch.randn(32, 16),), activation_budget="100%", cost_cache=folder)


def test_costs_survive_their_file(tmp_path: Path) -> None:
    cache = CostCache(tmp_path)
    costs = {"a": MeasuredCost(KernelCost(1.5e-4, 64, {0: 128}), True), "b": MeasuredCost(KernelCost(2.0), False)}
    cache.save(costs)
    assert CostCache(tmp_path).load() == costs


def test_what_one_process_measured_is_not_run_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = planned(tmp_path)

    def refuse(*args: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(measure, "prepare_kernel", refuse)
    monkeypatch.setattr(timing, "prepare_kernel", refuse)
    second = planned(tmp_path)
    assert second.graph == first.graph


def test_other_threads_have_costs_of_their_own(tmp_path: Path) -> None:
    cache = CostCache(tmp_path)
    cache.save({"a": MeasuredCost(KernelCost(1.0), True)})
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert cache.load() == {}
    finally:
        torch.set_num_threads(threads)
    assert cache.load() != {}


def test_a_warm_time_is_not_replaced_by_a_cold_one(tmp_path: Path) -> None:
    cache = CostCache(tmp_path)
    warm, cold = MeasuredCost(KernelCost(1.0), True), MeasuredCost(KernelCost(2.0), False)
    cache.save({"a": cold, "b": warm})
    cache.save({"a": warm, "b": cold})
    assert cache.load() == {"a": warm, "b": warm}


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b'{"format": "rematerialize.costs/1"}'])
def test_a_file_that_cannot_be_read_is_empty_and_replaced(content: bytes, tmp_path: Path) -> None:
    cache = CostCache(tmp_path)
    cache.path.write_bytes(content)
    assert cache.load() == {}
    costs = {"a": MeasuredCost(KernelCost(1.0), True)}
    cache.save(costs)
    assert cache.load() == costs


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_memory_of_it(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder", encoding="utf-8")
    assert planned(occupied).overhead == 0


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, runs = timing._Clock.run, []

    def interrupted(clock: Any) -> None:
        runs.append(clock)
        if len(runs) == 4:
            raise KeyboardInterrupt
        run(clock)

    with monkeypatch.context() as patched:
        patched.setattr(timing._Clock, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            planned(tmp_path)
    kept = CostCache(tmp_path).load()
    assert sum(measured.warm for measured in kept.values()) == 3
    time_kernels, again = measure.time_kernels, []
    monkeypatch.setattr(
        measure, "time_kernels", lambda kernels, *rest: again.extend(kernels) or time_kernels(kernels, *rest)
    )
    planned(tmp_path)
    known = CostCache(tmp_path).load()
    assert kept.keys() < known.keys()  # masks as bytes have kernels of their own, which come last
    assert len(again) == len(known) - 3
    assert all(measured.warm for measured in known.values())


def test_progress_counts_up_to_the_end(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    remat.plan(
        model(),
        (torch.randn(32, 16),),
        activation_budget="100%",
        cost_cache=tmp_path,
        progress=lambda *stage: told.append(stage),
    )
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["capture", "costs", "solve"]
    for stage in ("capture", "costs", "solve"):
        steps = [(done, total) for name, done, total in told if name == stage]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cost_cache.default_folder() == tmp_path / "rematerialize"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cost_cache.default_folder() == tmp_path / ".cache" / "rematerialize"
