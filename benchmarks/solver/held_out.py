"""Models of the same kinds as the small ones, in other sizes: no solver was tuned while looking at them.

Once one of them has led to a change of a solver, it has served: put another size in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from benchmarks.solver.models import Factory, SquareLoss, bottlenecks, random_net, transformer, unrolled_lstm
from rematerialize.zoo import bert, cross_modal, densenet, gcn, pinn, unet
from rematerialize.zoo.spec import Made


def _chain(layers: int, width: int, activation: Callable[[], nn.Module], rows: int) -> Factory:
    def made() -> Made:
        parts = [part for _ in range(layers) for part in (nn.Linear(width, width), activation())]
        return SquareLoss(*parts), (torch.randn(rows, width),)

    return made


def _uneven_chain() -> Made:
    widths = (48, 8, 112, 112, 20, 180, 64, 12, 96, 256, 40, 72, 16, 144, 24)
    layers: list[nn.Module] = []
    before = 3
    for index, width in enumerate(widths):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU() if index % 4 else nn.GELU()]
        if index in {2, 7}:
            layers.append(nn.AvgPool2d(2))
        before = width
    return SquareLoss(*layers), (torch.randn(16, 3, 128, 128),)


def _bert() -> Made:
    config = bert.EncoderConfig(layers=1, width=640, heads=10, tokens=384, batch=8, vocabulary=16000)
    shape = (config.batch, config.tokens)
    tokens = torch.zeros(shape, dtype=torch.long)
    inputs = {"tokens": tokens, "padding": torch.zeros(shape, dtype=torch.bool), "labels": tokens.clone()}
    return bert.MaskedLanguageModel(config), inputs


def _unet() -> Made:
    config = unet.UNetConfig(width=40, depth=3, pixels=192, batch=8)
    shape = (config.batch, 3, config.pixels, config.pixels)
    return unet.UNet(config), (torch.randn(shape), torch.randn(shape))


def _densenet() -> Made:
    config = densenet.DenseConfig(growth=20, pixels=160, batch=48, depths=(3, 3, 5))
    images = torch.randn(config.batch, 3, config.pixels, config.pixels)
    return densenet.DenseNet121(config), (images, torch.zeros(config.batch, dtype=torch.long))


def _towers() -> Made:
    config = cross_modal.TowersConfig(128, 16, 32, 256, 4096, image_blocks=1, text_blocks=3, sound_blocks=2)
    inputs = {
        "images": torch.randn(config.batch, 3, config.pixels, config.pixels),
        "text": torch.zeros(config.batch, config.tokens, dtype=torch.long),
        "sound": torch.randn(config.batch, 1, config.samples),
        "match": torch.zeros(config.batch),
    }
    return cross_modal.CrossModal(config), inputs


def _pinn() -> Made:
    config = pinn.FlowConfig(width=192, depth=1, points=131072)
    return pinn.NavierStokes(config), (torch.randn(config.points, 3), torch.randn(config.points, 2))


def _gcn() -> Made:
    config = gcn.GraphConfig(nodes=30_000, edges=600_000, width=96, layers=6)
    edges = torch.zeros(2, config.edges, dtype=torch.long)
    labels = torch.zeros(config.nodes, dtype=torch.long)
    return gcn.GCN(config), (torch.randn(config.nodes, config.width), edges, labels)


HELD_OUT: Mapping[str, Factory] = {
    "gpt2-4-layers": lambda: transformer(4, 384, 6, 16, 0.1),
    "bert-1-layer": _bert,
    "unet-3-levels": _unet,
    "densenet-3-3-5": _densenet,
    "resnet-2-1-1-2": lambda: bottlenecks((2, 1, 1, 2), 24),
    "three-short-towers": _towers,
    "uniform-chain-50": _chain(50, 768, nn.SiLU, 16384),
    "uniform-chain-32": _chain(32, 512, nn.Sigmoid, 32768),
    "uneven-chain-15": _uneven_chain,
    "lstm-cell-8-steps": lambda: unrolled_lstm(8, 128, 768),
    "lstm-cell-11-steps": lambda: unrolled_lstm(11, 512, 512),
    "pinn-1-layer": _pinn,
    "gcn-6-layers": _gcn,
    "random-11": lambda: random_net(32, 11, 0.1),
    "random-12": lambda: random_net(38, 12, 0.5),
    "random-13": lambda: random_net(34, 13, 0.9),
}
