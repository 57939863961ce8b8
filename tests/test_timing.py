"""Times of kernels: measured among their neighbours, with the views that their calls read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from rematerialize import timing
from rematerialize.capture import Kernel, KernelCost
from rematerialize.emit import emit
from rematerialize.measure import CostModel
from rematerialize.prepare import prepare_example
from rematerialize.runtime import needed_outputs
from rematerialize.timing import time_kernels
from rematerialize.views import view_kernels, with_views


class Clock:
    """A clock that kernels advance, each by the seconds that it was given, run after run, and so do their results."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.takes: dict[str, Callable[[], float]] = {}
        self.frees: dict[str, float] = {}
        monkeypatch.setattr(timing, "prepare_kernel", self.prepare)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def prepare(self, kernel: Kernel) -> Callable[[], Result]:
        def run() -> Result:
            self.log.append(kernel.name)
            self.now += self.takes[kernel.name]()
            return Result(self, self.frees.get(kernel.name, 0.0))

        return run

    def times(self, limit_s: float, step: Sequence[str] = ()) -> dict[str, float]:
        found: dict[str, float] = {}
        kernels = {name: (Kernel(name, "forward", [], [], []), 1.0) for name in self.takes}
        time_kernels(kernels, step or [*kernels], limit_s, found.__setitem__)
        return found


class Result:
    """What a kernel makes."""

    def __init__(self, clock: Clock, takes_s: float) -> None:
        self.clock = clock
        self.takes_s = takes_s

    def __del__(self) -> None:
        self.clock.now += self.takes_s


def test_a_kernel_pays_for_freeing_what_it_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.takes = {name: lambda: 1e-4 for name in ("first", "second", "third")}
    clock.frees = {"first": 2e-4, "third": 5e-4}
    assert clock.times(1000.0) == pytest.approx({"first": 3e-4, "second": 1e-4, "third": 6e-4})


def test_neighbours_run_in_turns_and_slow_ones_stop_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.takes = {"short": lambda: 1e-4, "long": lambda: 0.5, "medium": lambda: 0.015}
    assert clock.times(1000.0) == pytest.approx({"short": 1e-4, "long": 0.5, "medium": 0.015})
    assert clock.log[:6] == ["short", "long", "medium"] * 2
    assert clock.log[6:8] == ["short", "medium"]
    assert clock.log[8:] == ["short"] * 13


def test_neighbours_run_as_often_and_in_the_order_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.takes = {"embed": lambda: 1e-4, "mix": lambda: 1e-4, "add": lambda: 1e-4}
    step = ["embed", "mix", "add", "mix", "add", "elsewhere", "mix", "add"]
    clock.times(1000.0, step)
    assert clock.log[:3] == ["embed", "mix", "add"]  # the first time
    assert clock.log[3:17] == ["embed", "mix", "add", "mix", "add", "mix", "add"] * 2
    assert [clock.log[3:].count(name) for name in clock.takes] == [15, 15, 15]


FAULTS = """
import resource, torch
from rematerialize.timing import used_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [torch.ones(500_000) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
cap = used_memory()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults")
def test_results_find_memory_that_was_used_before() -> None:
    shown = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    assert int(shown) < 100  # thousands without it


def test_a_run_that_the_machine_held_up_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    took = iter([2e-3, 20.0, 1e-3])
    clock.takes = {"op": lambda: next(took)}
    assert clock.times(1000.0) == pytest.approx({"op": 2e-3})
    assert next(took, None) is None


def test_what_there_is_no_time_for_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_MOST_NEIGHBOURS", 1)
    clock = Clock(monkeypatch)
    clock.takes = {"first": lambda: 1.0, "second": lambda: 1.0}
    assert clock.times(0.5).keys() == {"first"}


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).view(*x.shape[:2], 2, 24).transpose(1, 2).chunk(3, dim=-1)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2)).square().mean()


@pytest.mark.usefixtures("quick_plans")
def test_every_view_that_is_emitted_is_counted_once() -> None:
    prepared = prepare_example(Heads(), (torch.randn(3, 5, 16),))
    views = view_kernels(prepared.kernels)
    emitted = emit(prepared.kernels, prepared.planner.store_all(), needed_outputs(prepared.captured.joint))
    makers = {str(call.target) for kernel in prepared.kernels.kernels for call, _ in kernel.calls}
    for phase, graph in (("forward", emitted.forward.graph), ("backward", emitted.backward.graph)):
        rebuilt = [
            node.target
            for node in graph.nodes
            if node.op == "call_function" and "allocating" not in node.meta and str(node.target) not in makers
        ]
        counted = [view.head.target for found in views.values() for view in found if view.phase == phase]
        assert sorted(map(str, counted)) == sorted(map(str, rebuilt))
        assert rebuilt


def test_a_kernel_pays_for_the_views_that_it_reads() -> None:
    prepared = prepare_example(Heads(), (torch.randn(3, 5, 16),))
    views = view_kernels(prepared.kernels)
    alone = CostModel()([each for kernel in prepared.kernels.kernels for each in (*views[kernel.name], kernel)])
    assert all(
        alone[view.name].time_s > 0 and not alone[view.name].transient_bytes for v in views.values() for view in v
    )
    paid = with_views(alone, views)
    reading = [name for name in paid if views[name]]
    assert reading
    for name, cost in paid.items():
        assert cost.time_s == alone[name].time_s + sum(alone[view.name].time_s for view in views[name])
        assert cost.transient_bytes == alone[name].transient_bytes
    assert with_views({"a": KernelCost(1.0)}, {"a": []}) == {"a": KernelCost(1.0)}
