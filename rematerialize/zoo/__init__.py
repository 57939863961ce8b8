"""The zoo: every model that the package must train under a budget, in one registry.

A model is one file with a factory plus one line here; tests and comparisons then cover it unasked. Reading the
registry imports neither torch nor any other library: factories are imported when they are called. `MODELS` are those
that can run, `ENTRIES` are all.
"""

from __future__ import annotations

from rematerialize.zoo.spec import Inputs, Lazy, Made, ModelSpec, Scale, loss_is_output

__all__ = ["ENTRIES", "MODELS", "Inputs", "Made", "ModelSpec", "Scale", "loss_is_output"]


def _first(name: str, about: str, module: str = "", variant: str = "", loss_of: str = "") -> ModelSpec:
    """Return a model of plain torch, with a twin that is checkpointed by hand."""
    module = module or name
    return ModelSpec(
        name,
        "first",
        Lazy(module, f"make{variant}"),
        Lazy(module, f"make{variant}_per_block"),
        loss_of=Lazy(module, loss_of) if loss_of else loss_is_output,
        loss_outside=bool(loss_of),
        about=about,
    )


def _extra(name: str, about: str, module: str, requires: str = "transformers") -> ModelSpec:
    """Return a model of another library, built from a tiny configuration: nothing is downloaded."""
    return ModelSpec(
        name,
        "models",
        Lazy(f"extra.{module}", name),
        per_block_reason="the zoo runs these against our own plans only",
        loss_of=Lazy("extra.build", "loss_of_output"),
        about=about,
        requires=requires,
    )


def _large(name: str, about: str, module: str, factory: str) -> ModelSpec:
    """Return a model that only fake tensors can hold."""
    return ModelSpec(
        name,
        "large",
        Lazy(module, factory),
        per_block_reason="it is made of fake tensors, which can't step",
        about=about,
    )


_ALL = (
    _first("gpt", "GPT decoder, 12 layers, dropout, loss inside"),
    _first("gpt_logits", "small GPT whose loss is outside", "gpt", "_small", "loss_from_logits"),
    _first("bert", "masked language model with padding"),
    _first("resnet50", "bottleneck residual network with BatchNorm", "resnet"),
    _first("densenet121", "densely connected network: every layer reads all before it", "densenet"),
    _first("unet", "U-Net: long skips from encoder to decoder"),
    _first("lstm", "two nn.LSTM layers over 200 steps"),
    _first("cross_modal", "image, text and sound towers that join"),
    _first("pinn", "physics-informed network: the loss holds second derivatives"),
    _first("autoencoder", "convolutional autoencoder of flow fields"),
    _first("gcn", "deep graph convolutions: gather and index_add"),
    _first("actor_critic", "shared trunk, two heads, loss outside", loss_of="loss_from_heads"),
    _extra("llama", "Llama decoder, grouped keys and values", "language"),
    _extra("gpt2", "GPT-2 decoder", "language"),
    _extra("bert_mlm", "BERT for masked language modelling", "language"),
    _extra("t5", "T5 encoder-decoder", "language"),
    _extra("mixtral", "Mixtral decoder with experts", "language"),
    _extra("mamba", "Mamba state-space model", "language"),
    _extra("vit", "vision transformer", "vision"),
    _extra("swin", "Swin transformer: shifted windows", "vision"),
    _extra("clip", "CLIP: image and text towers, contrastive loss", "vision"),
    _extra("unet2d_condition", "diffusion U-Net with cross attention", "diffusion", "diffusers"),
    _extra("autoencoder_kl", "variational autoencoder of latent diffusion", "diffusion", "diffusers"),
    _extra("gat", "graph attention network", "graphs", "torch_geometric"),
    _large("gpt-8.3b", "72-layer GPT of Megatron-LM (2019), 8.3 billion parameters", "gpt", "make_megatron"),
)

ENTRIES: dict[str, ModelSpec] = {spec.name: spec for spec in _ALL}
MODELS: dict[str, ModelSpec] = {name: spec for name, spec in ENTRIES.items() if not spec.fake_only}
