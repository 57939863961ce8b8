"""Maps of one pixel or one channel, in channels last: kernels choose their way by strides of single elements."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.twins import check_steps

pytestmark = pytest.mark.usefixtures("quick_plans")


class Residual(nn.Module):
    """ResNet's block."""

    def __init__(self, wide: int, wider: int) -> None:
        super().__init__()
        stride = 1 if wide == wider else 2
        self.first = nn.Conv2d(wide, wider, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(wider)
        self.second = nn.Conv2d(wider, wider, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(wider)
        self.side = nn.Identity() if stride == 1 else nn.Conv2d(wide, wider, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first_norm(self.first(x)), inplace=True)
        return F.relu(self.second_norm(self.second(hidden)) + self.side(x))


class Inverted(nn.Module):
    """MobileNet's and EfficientNet's block, with squeeze and excitation."""

    def __init__(self, wide: int, wider: int) -> None:
        super().__init__()
        self.stride, inner = 1 if wide == wider else 2, 4 * wide
        self.expand = nn.Sequential(nn.Conv2d(wide, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.SiLU())
        depthwise = nn.Conv2d(inner, inner, 3, self.stride, 1, groups=inner, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(inner), nn.SiLU())
        self.squeeze, self.excite = nn.Conv2d(inner, wide, 1), nn.Conv2d(wide, inner, 1)
        self.project = nn.Sequential(nn.Conv2d(inner, wider, 1, bias=False), nn.BatchNorm2d(wider))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.depthwise(self.expand(x))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(hidden, 1)))))
        hidden = self.project(hidden * gate)
        return x + hidden if self.stride == 1 else hidden


class Pyramid(nn.Module):
    """Four halvings of a picture of 16 pixels."""

    def __init__(self, block: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        widths = (8, 12, 12, 16, 16, 20, 20)
        self.blocks = nn.Sequential(*(block(a, b) for a, b in itertools.pairwise(widths)))
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels last", "contiguous"])
@pytest.mark.parametrize("block", [Residual, Inverted])
def test_networks_whose_last_maps_have_one_pixel(block: type[nn.Module], layout: torch.memory_format) -> None:
    pictures = torch.randn(2, 3, 16, 16).contiguous(memory_format=layout)
    check_steps(lambda: Pyramid(block).to(memory_format=layout), pictures)  # type: ignore[call-overload]


class Tokens(nn.Module):
    """Tokens as a map, between convolutions (SwiftFormer's): a permuted summand and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.near = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide, self.wide_norm = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)
        self.narrow = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.mix(self.norm(x.flatten(2).transpose(1, 2)))
        hidden = tokens.transpose(1, 2).reshape(x.shape)
        hidden = self.wide_norm(self.wide(torch.sigmoid(hidden + self.near(hidden))))
        # Two gradients of hidden meet: autograd adds the second to the convolution's, in place.
        return self.narrow(F.gelu(hidden) + hidden)  # type: ignore[no-any-return]


class Kept(Tokens):
    """Here the first gradient waits elsewhere, too: autograd makes a new tensor for the sum."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.near(x)
        hidden = self.wide_norm(self.wide(x))
        other = F.gelu(hidden)
        return self.narrow(hidden + torch.cat([before, before], 1)) + self.narrow(other)  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels last", "contiguous"])
@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (1, 8, 2, 2), (2, 8, 1, 3)], ids=str)
@pytest.mark.parametrize("make", [Tokens, Kept])
def test_gradients_that_meet_on_small_maps(
    make: type[Tokens], shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    maps = torch.empty(shape, memory_format=layout).copy_(torch.randn(shape))
    check_steps(lambda: make().to(memory_format=layout), maps)  # type: ignore[call-overload]


class Saliency(Tokens):
    """The gradient of an input inside of the forward: sums of gradients are in place there, too, unless recorded."""

    def __init__(self, recorded: bool) -> None:
        super().__init__()
        self.recorded = recorded

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        out = super().forward(x)
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=self.recorded, retain_graph=True)
        return out * torch.sigmoid(slope.mean()) + slope.square().mean()


@pytest.mark.parametrize("recorded", [True, False])
def test_gradients_inside_of_a_forward_on_small_maps(recorded: bool) -> None:
    maps = torch.empty(2, 8, 1, 1, memory_format=torch.channels_last).copy_(torch.randn(2, 8, 1, 1))
    check_steps(lambda: Saliency(recorded).to(memory_format=torch.channels_last), maps)  # type: ignore[call-overload]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels last", "contiguous"])
def test_pictures_of_one_channel(layout: torch.memory_format) -> None:
    def make() -> nn.Module:
        layers = (nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.SiLU(), nn.Upsample(scale_factor=2))
        return nn.Sequential(*layers, nn.Conv2d(1, 4, 3), nn.LogSoftmax(1)).to(memory_format=layout)  # type: ignore[call-overload,no-any-return]

    for batch in (1, 2):
        check_steps(make, torch.empty(batch, 1, 6, 6, memory_format=layout).copy_(torch.randn(batch, 1, 6, 6)))
