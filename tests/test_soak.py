"""A short soak: a GPT with dropout trained under its lowest budget keeps eager's losses and no memory."""

from __future__ import annotations

import torch

from benchmarks.soak import live_bytes, soak


def test_a_long_training_under_the_lowest_budget_is_eagers_and_keeps_no_memory() -> None:
    seen = soak(25)
    assert seen.passed, seen
    assert seen.budget_bytes < 0.2 * seen.store_all_bytes


def test_live_bytes_count_a_storage_once() -> None:
    before = live_bytes()
    whole = torch.zeros(1000)
    part = whole[10:]
    assert live_bytes() - before == part.untyped_storage().nbytes() == 4000
