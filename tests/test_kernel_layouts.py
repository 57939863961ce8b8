"""What fake kernels say of types and layouts is what the real ones return."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
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


SHAPE = (3, 4, 6, 6)


def layouts_of(value: Tensor) -> Iterator[Tensor]:
    """The same values: contiguous, channels last, reversed, and with gaps."""
    yield value
    for order in ([0, 2, 3, 1], [3, 2, 1, 0]):
        yield value.permute(order).contiguous().permute([order.index(dim) for dim in range(4)])
    yield value.repeat_interleave(2, dim=-1)[..., ::2]


OPS: dict[str, Callable[..., Tensor]] = {
    **{f"roll {shifts} {dims}": lambda x, y, s=shifts, d=dims: torch.roll(x, s, d)  # type: ignore[misc]
       for shifts, dims in ((1, 2), ((1, 2), (2, 3)), (1, None), (0, 2), (6, 3), ((1, 4), (0, 1)))},
    "fftshift": lambda x, y: torch.fft.fftshift(x),
    "poisson": lambda x, y: torch.poisson(x),
    "gamma": lambda x, y: torch._standard_gamma(x),
    "normal": lambda x, y: torch.normal(0.0, x),
    "isin": lambda x, y: torch.isin(x, y),
    "angle": lambda x, y: torch.angle(torch.complex(x, y)),
    "a comparison with a row": lambda x, y: x > y[:, :1],
    "fmin": torch.fmin,
    "heaviside": torch.heaviside,
    "ldexp": torch.ldexp,
    "xlog1py": torch.special.xlog1py,
    "atan2 of another type": lambda x, y: torch.atan2(x, y.double()),
    "copysign of a row": lambda x, y: torch.copysign(x[:, :1], y[..., :1]),
    "polar": torch.polar,
    "where": lambda x, y: torch.where(x > 0.5, y, x),
    "where, a row": lambda x, y: torch.where(x[:, :1] > 0.5, y, 1.0),
    "lerp": lambda x, y: torch.lerp(x, y, y),
    "addcmul": lambda x, y: torch.addcmul(x[:1], y, x),
    "hardsigmoid_backward": aten.hardsigmoid_backward,
    "rrelu backward": lambda x, y: aten.rrelu_with_noise_backward(x, x.clone(), y, 0.1, 0.3, True, False),
    "rrelu backward, no noise": lambda x, y: aten.rrelu_with_noise_backward(x, y, x, 0.1, 0.3, False, False),
    "masked_fill": lambda x, y: x.masked_fill(y > 0.5, 0.0),
    "masked_fill by a row": lambda x, y: x.masked_fill(y[:1, :1] > 0.5, 0.0),
    "an index": lambda x, y: x[(y[0] * 3).long()],
    "an index behind": lambda x, y: x[..., (y[0] * 3).long()],
    "two indices": lambda x, y: x[:, (y[0, 0] * 3).long(), :, (y[0, 1] * 3).long()],
    "two adjacent indices": lambda x, y: x[:, (y[0, 0] * 3).long(), (y[0, :1, :, 1] * 3).long()],
    "grid_sample": lambda x, y: aten.grid_sampler_2d(x, y[..., :2], 0, 0, False),
    "glu_backward": lambda x, y: aten.glu_backward(x[:, :2], y, 1),
    "bicubic": lambda x, y: torch.nn.functional.interpolate(x[:1].expand(SHAPE), scale_factor=2, mode="bicubic"),
}  # fmt: skip


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_results_are_laid_out_as_kernels_lay_them(op: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    for x, y in itertools.product(layouts_of(torch.rand(SHAPE)), layouts_of(torch.rand(SHAPE))):
        mode = FakeTensorMode()
        with faking(mode):
            fake = op(mode.from_tensor(x), mode.from_tensor(y))
        assert fake.stride() == op(x, y).stride(), (x.stride(), y.stride())


OF_ONE_ELEMENT: dict[str, Callable[..., Any]] = {
    "add": torch.add,
    "add a number": lambda x, y: x + 0.5,
    "add a row": lambda x, y: x + y[:, :1],
    "add of another type": lambda x, y: x + y.double(),
    "relu": lambda x, y: torch.relu(x),
    "sigmoid": lambda x, y: torch.sigmoid(x),
    "hardtanh": lambda x, y: torch.nn.functional.hardtanh(x),
    "gelu": lambda x, y: torch.nn.functional.gelu(x),
    "pow": lambda x, y: x**2,
    "pow of a number": lambda x, y: 2.0**x,
    "remainder of a number": lambda x, y: torch.remainder(2.0, x),
    "abs": lambda x, y: torch.abs(x),
    "abs of complex": lambda x, y: torch.abs(torch.complex(x, y)),
    "nan_to_num": lambda x, y: torch.nan_to_num(x),
    "clone": lambda x, y: x.clone(),
    "clone, contiguous": lambda x, y: x.clone(memory_format=torch.contiguous_format),
    "to another type": lambda x, y: x.double(),
    "a comparison": lambda x, y: x > y,
    "where": lambda x, y: torch.where(x > 0.5, y, x),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y: torch.addcmul(x, y, x),
    "masked_fill": lambda x, y: x.masked_fill(y > 0.5, 0.0),
    "threshold_backward": lambda x, y: aten.threshold_backward(x, y, 0.5),
    "log_sigmoid_backward": lambda x, y: aten.log_sigmoid_backward(x, y, x),
    "log_softmax": lambda x, y: torch.log_softmax(x, 1),
    "softmax": lambda x, y: torch.softmax(x, 1),
    "fft": lambda x, y: torch.fft.fft(torch.complex(x, y), dim=0),
    "rfft2": lambda x, y: torch.fft.rfft2(x, dim=(1, 0)),
    "irfft": lambda x, y: torch.fft.irfft(torch.complex(x, y), n=4, dim=1),
    "irfft2": lambda x, y: torch.fft.irfft2(torch.complex(x, y), s=(4, 4), dim=(3, 0)),
    "nearest": lambda x, y: torch.nn.functional.interpolate(x, scale_factor=2),
    "bilinear": lambda x, y: torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear"),
    "an index": lambda x, y: x[:, (y[:, 0, 0] > 5).long()],
    "index_put": lambda x, y: x.index_put([torch.zeros(2, dtype=torch.long)], y[0]),
    "renorm": lambda x, y: torch.renorm(x, 2, 0, 0.5),
}


def layouts_of_one_element(value: Tensor) -> Iterator[Tensor]:
    """The same values: of every order of dimensions, each as it comes and as one that was sliced."""
    yield value
    for order in itertools.permutations(range(4)):
        yield value.permute(order).contiguous().permute([order.index(dim) for dim in range(4)])
    _, channels, height, width = value.shape
    yield value.as_strided(value.shape, (channels * height * width, 1, channels * width, channels)).copy_(value.clone())
    yield torch.cat([value, value], 1)[:, :channels]
    yield torch.cat([value, value], -1)[..., :width]


@pytest.mark.parametrize("op", OF_ONE_ELEMENT.values(), ids=OF_ONE_ELEMENT)
def test_strides_of_dimensions_of_one_element_are_those_of_kernels(op: Callable[..., Any]) -> None:
    # Convolutions and norms choose by them how they go through their input, and so how they round.
    for shape in ((2, 8, 1, 1), (1, 4, 4, 4), (2, 1, 4, 4), (1, 8, 3, 1)):
        value = torch.rand(shape)
        for x, y in itertools.product(layouts_of_one_element(value), [*layouts_of_one_element(value)][::9]):
            mode = FakeTensorMode()
            with faking(mode):
                fake = op(mode.from_tensor(x), mode.from_tensor(y))
            assert fake.stride() == op(x, y).stride(), (shape, x.stride(), y.stride())
