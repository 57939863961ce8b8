"""Real architectures of the `models` extra: built from tiny configurations, nothing downloaded."""

from __future__ import annotations

import importlib.util

from benchmarks.models.extra import diffusion, graphs, language, vision
from benchmarks.models.extra.build import loss_of_output
from benchmarks.models.spec import ModelSpec

_FACTORIES = {
    "llama": language.llama,
    "gpt2": language.gpt2,
    "bert_mlm": language.bert_mlm,
    "t5": language.t5,
    "mixtral": language.mixtral,
    "mamba": language.mamba,
    "vit": vision.vit,
    "swin": vision.swin,
    "clip": vision.clip,
    "unet2d_condition": diffusion.unet2d_condition,
    "autoencoder_kl": diffusion.autoencoder_kl,
    "gat": graphs.gat,
}
REQUIRES = {"unet2d_condition": "diffusers", "autoencoder_kl": "diffusers", "gat": "torch_geometric"}


def missing(name: str) -> str:
    """Return the package of the `models` extra that the model lacks here, or an empty string."""
    package = REQUIRES.get(name, "transformers")
    return "" if importlib.util.find_spec(package) else package


SPECS = tuple(
    ModelSpec(
        name,
        "models",
        factory,
        per_block_reason="the zoo runs these against our own plans only",
        loss_of=loss_of_output,
    )
    for name, factory in _FACTORIES.items()
)
