"""What every test shares: reproducible Hypothesis, and no CUDA test where there is no CUDA."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("shared", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.fixture
def quick_costs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and each kernel timed shortly: for tests of values and bytes, not of seconds."""
    import torch  # here, so that a run of the solver's tests alone stays without it

    from rematerialize import measure

    monkeypatch.setattr(measure, "_TIMED_SECONDS_PER_KERNEL", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums that threads split have an order of their own
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cuda_items = [item for item in items if item.get_closest_marker("cuda")]
    if not cuda_items:
        return
    import torch  # here, so that a run of the solver's tests alone stays without it

    if not torch.cuda.is_available():
        for item in cuda_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
