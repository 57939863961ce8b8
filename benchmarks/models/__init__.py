"""The zoo: every model that the package must train under a budget, in one registry.

A model is one file with a factory plus one line here; tests and comparisons then cover it unasked.
"""

from __future__ import annotations

from benchmarks.models import (
    actor_critic,
    autoencoder,
    bert,
    cross_modal,
    densenet,
    gcn,
    gpt,
    lstm,
    pinn,
    resnet,
    unet,
)
from benchmarks.models.extra import SPECS as _EXTRA
from benchmarks.models.spec import Inputs, Made, ModelSpec, Scale, loss_is_output

_FIRST = (
    ModelSpec("gpt", "first", gpt.make, gpt.make_per_block),
    ModelSpec(
        "gpt_logits",
        "first",
        gpt.make_small,
        gpt.make_small_per_block,
        loss_of=gpt.loss_from_logits,
        loss_outside=True,
    ),
    ModelSpec("bert", "first", bert.make, bert.make_per_block),
    ModelSpec("resnet50", "first", resnet.make, resnet.make_per_block),
    ModelSpec("densenet121", "first", densenet.make, densenet.make_per_block),
    ModelSpec("unet", "first", unet.make, unet.make_per_block),
    ModelSpec("lstm", "first", lstm.make, lstm.make_per_block),
    ModelSpec("cross_modal", "first", cross_modal.make, cross_modal.make_per_block),
    ModelSpec("pinn", "first", pinn.make, pinn.make_per_block),
    ModelSpec("autoencoder", "first", autoencoder.make, autoencoder.make_per_block),
    ModelSpec("gcn", "first", gcn.make, gcn.make_per_block),
    ModelSpec(
        "actor_critic",
        "first",
        actor_critic.make,
        actor_critic.make_per_block,
        loss_of=actor_critic.loss_from_heads,
        loss_outside=True,
    ),
)

MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in (*_FIRST, *_EXTRA)}

__all__ = ["MODELS", "Inputs", "Made", "ModelSpec", "Scale", "loss_is_output"]
