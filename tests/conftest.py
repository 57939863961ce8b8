"""What every test shares: reproducible Hypothesis, and no CUDA test where there is no CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings

from rematerialize.solve import polish

settings.register_profile("shared", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.fixture
def quick_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, each kernel timed shortly, short searches: for tests of values and bytes, not of seconds."""
    import torch  # here, so that a run of the solver's tests alone stays without it

    from rematerialize import timing

    monkeypatch.setattr(timing, "_TIMED_SECONDS_PER_KERNEL", 0.0)
    monkeypatch.setattr(polish, "effort_for", _little_effort)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums that threads split have an order of their own
    yield
    torch.set_num_threads(threads)


def _little_effort(ops: int, effort_for: Callable[[int], polish.Effort] = polish.effort_for) -> polish.Effort:
    usual = effort_for(ops)
    moves = {name: getattr(usual, name) // 10 for name in ("first", "second", "squeeze", "patient", "halfway")}
    return replace(usual, **moves, exchanges=1, deepest=0, lanes=0, rounds=0, spliced=0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cuda_items = [item for item in items if item.get_closest_marker("cuda")]
    if not cuda_items:
        return
    import torch  # here, so that a run of the solver's tests alone stays without it

    if not torch.cuda.is_available():
        for item in cuda_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
