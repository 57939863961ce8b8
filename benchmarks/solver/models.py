"""The models behind the captured graphs: factories of (model in train mode, inputs), all run on fake tensors.

Sizes are those of a GPU's training step: activations outweigh the weights, as where memory is short.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rematerialize.zoo import bert, cross_modal, densenet, gcn, gpt, lstm, pinn, resnet, unet
from rematerialize.zoo.spec import Made

Factory = Callable[[], Made]


class SquareLoss(nn.Sequential):
    """Layers, then the mean square of what they give."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x.square().mean()


class UnrolledLSTM(nn.Module):
    """One LSTM cell stepped by a Python loop, a loss on every state."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(features, hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        h = inputs.new_zeros(inputs.shape[1], self.cell.hidden_size)
        c = torch.zeros_like(h)
        loss = inputs.new_zeros(())
        for x in inputs:
            h, c = self.cell(x, (h, c))
            loss = loss + h.square().mean()
        return loss


class RandomNet(nn.Module):
    """A seeded random network: each node reads one to three earlier ones, mostly recent, and a few from far back.

    Parameters
    ----------
    nodes : int
    seed : int
    far : float
        Probability that an extra input is drawn from all earlier nodes rather than from the last four.
    """

    def __init__(self, nodes: int, seed: int, far: float) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.widths = [256]
        self.sources: list[list[int]] = []
        self.layers = nn.ModuleList()
        for node in range(1, nodes + 1):
            count = min(node, draw.choices((1, 2, 3), (6, 3, 1))[0])
            sources = {node - 1} if draw.random() < 0.8 else {draw.randrange(node)}
            while len(sources) < count:
                low = 0 if draw.random() < far else max(0, node - 4)
                sources.add(draw.randrange(low, node))
            self.sources.append(sorted(sources))
            width = draw.choice((128, 256, 256, 512, 1024))
            activation = draw.choice((nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.Identity))
            parts: list[nn.Module] = [nn.Linear(sum(self.widths[source] for source in sources), width), activation()]
            if draw.random() < 0.3:
                parts.insert(1, nn.LayerNorm(width))
            self.layers.append(nn.Sequential(*parts))
            self.widths.append(width)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        used: set[int] = set()
        for sources, layer in zip(self.sources, self.layers, strict=True):
            read = [values[source] for source in sources]
            values.append(layer(torch.cat(read, 1) if len(read) > 1 else read[0]))
            used.update(sources)
        ends = [value for index, value in enumerate(values) if index not in used]
        return torch.stack([end.square().mean() for end in ends]).sum()


def _text(model: gpt.GPT, batch: int, tokens: int, vocabulary: int) -> Made:
    text = torch.zeros(2, batch, tokens, dtype=torch.long)
    return model, (text[0].clone(), text[1].clone() % vocabulary)


def transformer(layers: int, width: int, heads: int, batch: int, dropout: float, vocabulary: int = 50304) -> Made:
    """A GPT-2 of 1,024 tokens."""
    config = gpt.GPTConfig(layers, width, heads, 1024, batch, vocabulary, dropout)
    return _text(gpt.GPT(config), batch, 1024, vocabulary)


def _gpt2_block() -> Made:
    config = gpt.GPTConfig(1, 768, 12, 1024, 8, 50304, 0.1)
    return SquareLoss(gpt.Block(config)), (torch.randn(8, 1024, 768),)


def encoder(config: bert.EncoderConfig) -> Made:
    """BERT behind its masked language model's loss."""
    shape = (config.batch, config.tokens)
    tokens = torch.zeros(shape, dtype=torch.long)
    inputs = {"tokens": tokens, "padding": torch.zeros(shape, dtype=torch.bool), "labels": tokens.clone()}
    return bert.MaskedLanguageModel(config), inputs


def segmentation(config: unet.UNetConfig) -> Made:
    """A U-Net on images, for images."""
    shape = (config.batch, 3, config.pixels, config.pixels)
    return unet.UNet(config), (torch.randn(shape), torch.randn(shape))


def dense_blocks(config: densenet.DenseConfig) -> Made:
    """A DenseNet on images."""
    images = torch.randn(config.batch, 3, config.pixels, config.pixels)
    return densenet.DenseNet121(config), (images, torch.zeros(config.batch, dtype=torch.long))


def bottlenecks(depths: tuple[int, ...], batch: int) -> Made:
    """A ResNet of bottleneck blocks, so many per stage, on ImageNet's images."""
    config = resnet.ImageConfig(width=64, pixels=224, batch=batch, classes=1000, depths=depths)
    images = torch.randn(batch, 3, config.pixels, config.pixels)
    return resnet.ResNet50(config), (images, torch.zeros(batch, dtype=torch.long))


def towers(image_blocks: int, text_blocks: int, sound_blocks: int) -> Made:
    """Three towers of so many blocks, and the head that joins them."""
    config = cross_modal.TowersConfig(
        128, 16, 32, 256, 4096, image_blocks=image_blocks, text_blocks=text_blocks, sound_blocks=sound_blocks
    )
    inputs = {
        "images": torch.randn(config.batch, 3, config.pixels, config.pixels),
        "text": torch.zeros(config.batch, config.tokens, dtype=torch.long),
        "sound": torch.randn(config.batch, 1, config.samples),
        "match": torch.zeros(config.batch),
    }
    return cross_modal.CrossModal(config), inputs


def uniform_chain(count: int, width: int, activation: Callable[[], nn.Module], rows: int) -> Made:
    """Linear layers of one width, each with an activation behind it."""
    layers = [part for _ in range(count) for part in (nn.Linear(width, width), activation())]
    return SquareLoss(*layers), (torch.randn(rows, width),)


def uneven_chain(widths: Sequence[int], activation: Callable[[int], nn.Module], halved_after: Container[int]) -> Made:
    """Convolutions of many widths on images that some layers halve; ``activation`` goes by the layer's number."""
    layers: list[nn.Module] = []
    before = 3
    for index, width in enumerate(widths):
        layers += [nn.Conv2d(before, width, 3, padding=1), activation(index)]
        if index in halved_after:
            layers.append(nn.AvgPool2d(2))
        before = width
    return SquareLoss(*layers), (torch.randn(16, 3, 128, 128),)


def unrolled_lstm(steps: int, batch: int, hidden: int) -> Made:
    """One LSTM cell in a loop."""
    return UnrolledLSTM(hidden, hidden), (torch.randn(steps, batch, hidden),)


def _lstm() -> Made:
    config = lstm.SurrogateConfig(features=32, hidden=512, batch=64, steps=100)
    shape = (config.steps, config.batch, config.features)
    return lstm.Surrogate(config), (torch.randn(shape), torch.randn(shape))


def _autoencoder() -> Made:
    widths = (2, 32, 64, 128, 256, 512)
    layers: list[nn.Module] = []
    for before, width in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ELU()]
    layers += [nn.Flatten(), nn.Linear(512 * 64, 256), nn.Linear(256, 512 * 64), nn.Unflatten(1, (512, 8, 8))]
    for before, width in itertools.pairwise(widths[:0:-1]):
        layers += [nn.ConvTranspose2d(before, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ELU()]
    layers.append(nn.ConvTranspose2d(widths[1], widths[0], 4, 2, 1))
    return SquareLoss(*layers), (torch.randn(32, 2, 256, 256),)


def flow(config: pinn.FlowConfig) -> Made:
    """A physics-informed network with second derivatives in its loss."""
    return pinn.NavierStokes(config), (torch.randn(config.points, 3), torch.randn(config.points, 2))


def graph_layers(config: gcn.GraphConfig) -> Made:
    """Graph convolutions on one graph."""
    edges = torch.zeros(2, config.edges, dtype=torch.long)
    labels = torch.zeros(config.nodes, dtype=torch.long)
    return gcn.GCN(config), (torch.randn(config.nodes, config.width), edges, labels)


def random_net(nodes: int, seed: int, far: float) -> Made:
    """A `RandomNet` on 8,192 rows."""
    return RandomNet(nodes, seed, far), (torch.randn(8192, 256),)


SMALL: Mapping[str, Factory] = {
    "gpt2-block": _gpt2_block,
    "gpt2-2-layers": lambda: transformer(2, 768, 12, 8, 0.0),
    "bert-2-layers": lambda: encoder(
        bert.EncoderConfig(layers=2, width=768, heads=12, tokens=512, batch=16, vocabulary=30522)
    ),
    "unet": lambda: segmentation(unet.UNetConfig(width=32, depth=4, pixels=256, batch=8)),
    "densenet": lambda: dense_blocks(densenet.DenseConfig(growth=32, pixels=224, batch=32, depths=(3, 4, 4, 3))),
    "resnet-26": lambda: bottlenecks((2, 2, 2, 2), 32),
    "three-towers": lambda: towers(3, 1, 4),
    "uniform-chain": lambda: uniform_chain(40, 1024, nn.Tanh, 16384),
    "uneven-chain": lambda: uneven_chain(
        (16, 64, 32, 128, 48, 256, 32, 96, 24, 192, 64, 16, 160, 32, 128, 8),
        lambda index: nn.SiLU() if index % 3 else nn.GELU(),
        {4, 9},
    ),
    "lstm-cell-10-steps": lambda: unrolled_lstm(10, 256, 1024),
    "lstm-chunks": _lstm,
    "autoencoder": _autoencoder,
    "pinn": lambda: flow(pinn.FlowConfig(width=256, depth=2, points=65536)),
    "gcn": lambda: graph_layers(gcn.GraphConfig(nodes=100_000, edges=1_000_000, width=128, layers=8)),
    "random-near": lambda: random_net(30, 1, 0.0),
    "random-mixed": lambda: random_net(40, 2, 0.3),
    "random-far": lambda: random_net(36, 3, 0.9),
}


@contextlib.contextmanager
def _half() -> Iterator[None]:
    """Parameters in bfloat16 from the start: fake ones can't be cast."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _megatron() -> Made:
    """The 8.3-billion-parameter GPT of Shoeybi et al., "Megatron-LM" (2019)."""
    with _half():
        return transformer(72, 3072, 24, 8, 0.0, vocabulary=51200)


def _llama() -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        use_cache=False,
    )
    tokens = torch.zeros(4, 2048, dtype=torch.long)
    with _half():
        model = LlamaForCausalLM(config).train()
    return model, {"input_ids": tokens, "labels": tokens.clone()}


def _t5() -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32128, d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, use_cache=False)
    config.decoder_start_token_id = 0
    tokens = torch.zeros(8, 512, dtype=torch.long)
    with _half():
        model = T5ForConditionalGeneration(config).train()
    return model, {"input_ids": tokens, "labels": tokens.clone()}


def _swin() -> Made:
    from transformers import SwinConfig, SwinForImageClassification

    make: Any = SwinConfig
    config = make(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], num_labels=1000)
    inputs = {"pixel_values": torch.randn(64, 3, 224, 224), "labels": torch.zeros(64, dtype=torch.long)}
    return SwinForImageClassification(config).train(), inputs


class Denoising(nn.Module):
    """A diffusion U-Net behind the loss that trains it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor, times: Tensor, text: Tensor, noise: Tensor) -> Tensor:
        predicted: Tensor = self.model(latents, times, encoder_hidden_states=text, return_dict=False)[0]
        return (predicted - noise).square().mean()


def _unet2d_condition() -> Made:
    """The U-Net of Stable Diffusion 1.5, which is diffusers' default but for the text's width."""
    import diffusers

    make: Any = diffusers.UNet2DConditionModel
    with _half():
        model = Denoising(make(sample_size=64, cross_attention_dim=768, attention_head_dim=8))
        latents, text = torch.randn(16, 4, 64, 64), torch.randn(16, 77, 768)
    return model.train(), (latents, torch.zeros(16, dtype=torch.long), text, torch.zeros_like(latents))


LARGE: Mapping[str, Factory] = {
    "gpt-12-layers": lambda: transformer(12, 768, 12, 8, 0.1),
    "megatron-72-layers": _megatron,
    "llama-24-layers": _llama,
    "t5-large": _t5,
    "swin-base": _swin,
    "resnet-152": lambda: bottlenecks((3, 8, 36, 3), 64),
    "unet2d-condition": _unet2d_condition,
    "lstm-cell-1000-steps": lambda: unrolled_lstm(1000, 64, 1024),
}
