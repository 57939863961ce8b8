"""Measured costs of kernels: what else the process does meanwhile isn't theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rematerialize import measure
from rematerialize.capture import Kernel
from tests.test_cost import kernels_of


def test_a_tensor_that_dies_while_a_kernel_runs_is_not_what_the_kernel_gives_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = kernels_of(nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8)), torch.randn(5, 3, 8)).kernels
    quiet = measure.CostModel(0.0)(kernels)
    assert any(cost.transient_bytes for cost in quiet.values())
    prepare = measure.prepare_kernel

    def littered(kernel: Kernel) -> Callable[[], Any]:
        run = prepare(kernel)
        cycle: list[Any] = [torch.empty(100_000)]
        cycle.append(cycle)

        def among_new_objects() -> Any:
            kept = [[] for _ in range(100_000)]  # type: ignore[var-annotated]  # enough for a collection of its own
            return run() if kept else None

        return among_new_objects

    monkeypatch.setattr(measure, "prepare_kernel", littered)
    noisy = measure.CostModel(0.0)(kernels)
    assert {name: cost.transient_bytes for name, cost in noisy.items()} == {
        name: cost.transient_bytes for name, cost in quiet.items()
    }
