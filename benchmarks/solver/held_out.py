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
    "resnet-2-1-1-2": lambda: models.bottlenecks((2, 1, 1, 2), 24),
    "three-short-towers": lambda: models.towers(1, 3, 2),
    "uniform-chain-50": lambda: models.uniform_chain(50, 768, nn.SiLU, 16384),
    "uniform-chain-32": lambda: models.uniform_chain(32, 512, nn.Sigmoid, 32768),
    "uneven-chain-15": lambda: models.uneven_chain(
        (48, 8, 112, 112, 20, 180, 64, 12, 96, 256, 40, 72, 16, 144, 24),
        lambda index: nn.ReLU() if index % 4 else nn.GELU(),
        {2, 7},
    ),
    "lstm-cell-8-steps": lambda: models.unrolled_lstm(8, 128, 768),
    "lstm-cell-11-steps": lambda: models.unrolled_lstm(11, 512, 512),
    "pinn-1-layer": lambda: models.flow(pinn.FlowConfig(width=192, depth=1, points=131072)),
    "gcn-6-layers": lambda: models.graph_layers(gcn.GraphConfig(nodes=30_000, edges=600_000, width=96, layers=6)),
    "random-11": lambda: models.random_net(32, 11, 0.1),
    "random-12": lambda: models.random_net(38, 12, 0.5),
    "random-13": lambda: models.random_net(34, 13, 0.9),
}
