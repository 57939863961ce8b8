"""What fake kernels say of types is what the real ones return, where weights have a higher precision than values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rematerialize.capture.kernel_layouts import faking

aten = torch.ops.aten


def types_of(results: Any) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    return [(one.dtype, tuple(one.shape)) for one in results if isinstance(one, Tensor)]


def norms(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor) -> list[tuple[Any, ...]]:
    batch = [
        (aten.native_batch_norm.default, x, weight, bias, mean, var, training, 0.1, 1e-5) for training in (True, False)
    ]
    return [
        *batch,
        (aten.native_batch_norm.default, x, weight, bias, None, None, True, 0.1, 1e-5),
        (aten._native_batch_norm_legit_functional.default, x, weight, bias, mean, var, True, 0.1, 1e-5),
        (aten._native_batch_norm_legit.no_stats, x, weight, bias, True, 0.1, 1e-5),
        (aten._native_batch_norm_legit_no_training.default, x, weight, bias, mean, var, 0.1, 1e-5),
        (aten.native_group_norm.default, x, weight, bias, 4, 8, 64, 2, 1e-5),
        (aten.native_layer_norm.default, x, [8], weight, bias, 1e-5),
    ]


@pytest.mark.parametrize("affine", ["weight and bias", "weight", "none"])
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32 weights", "weights alike"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_statistics_of_norms_have_the_types_that_kernels_give_them(
    dtype: torch.dtype, weights: torch.dtype | None, affine: str
) -> None:
    x, ones = torch.randn(4, 8, 8, 8).to(dtype), torch.ones(8, dtype=weights or dtype)
    weight, bias = (ones if "weight" in affine else None), (ones if "bias" in affine else None)
    for op, *arguments in norms(x, weight, bias, torch.zeros_like(ones), ones.clone()):
        real = op(*arguments)
        mode = FakeTensorMode()
        given = [mode.from_tensor(one) if isinstance(one, Tensor) else one for one in arguments]
        with faking(mode):
            fake = op(*given)
        assert types_of(fake) == types_of(real), op
