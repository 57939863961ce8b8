"""Models of the same kinds as the small ones, in other sizes: no solver was tuned while looking at them.

Once one of them has led to a change of a solver, it has served: put another size in its place.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from benchmarks.solver import models
from benchmarks.solver.models import Factory
from rematerialize.zoo import bert, densenet, gcn, pinn, unet

HELD_OUT: Mapping[str, Factory] = {
    "gpt2-4-layers": lambda: models.transformer(4, 384, 6, 16, 0.1),
    "bert-1-layer": lambda: models.encoder(
        bert.EncoderConfig(layers=1, width=640, heads=10, tokens=384, batch=8, vocabulary=16000)
    ),
    "unet-3-levels": lambda: models.segmentation(unet.UNetConfig(width=40, depth=3, pixels=192, batch=8)),
    "densenet-3-3-5": lambda: models.dense_blocks(
        densenet.DenseConfig(growth=20, pixels=160, batch=48, depths=(3, 3, 5))
    ),
    "resnet-1-2-2-1": lambda: models.bottlenecks((1, 2, 2, 1), 40),
    "three-short-towers": lambda: models.towers(1, 3, 2),
    "uniform-chain-46": lambda: models.uniform_chain(46, 896, nn.SiLU, 16384),
    "uniform-chain-36": lambda: models.uniform_chain(36, 640, nn.Sigmoid, 32768),
    "uneven-chain-15": lambda: models.uneven_chain(
        (48, 8, 112, 112, 20, 180, 64, 12, 96, 256, 40, 72, 16, 144, 24),
        lambda index: nn.ReLU() if index % 4 else nn.GELU(),
        {2, 7},
    ),
    "lstm-cell-9-steps": lambda: models.unrolled_lstm(9, 192, 896),
    "lstm-cell-11-narrow": lambda: models.unrolled_lstm(11, 160, 1280),
    "pinn-narrow": lambda: models.flow(pinn.FlowConfig(width=144, depth=1, points=196608)),
    "gcn-7-layers": lambda: models.graph_layers(gcn.GraphConfig(nodes=25_000, edges=400_000, width=112, layers=7)),
    "random-17": lambda: models.random_net(36, 17, 0.2),
    "random-20": lambda: models.random_net(35, 20, 0.5),
    "random-21": lambda: models.random_net(37, 21, 0.8),
}
