"""Vision models of transformers, in train mode."""

from __future__ import annotations

import torch

from rematerialize.zoo.spec import Made, Scale

BATCH = {"test": 4, "bench": 16}
PIXELS = 64
LABELS = 2  # the configurations' default


def _images(scale: Scale) -> torch.Tensor:
    return torch.randn(BATCH[scale], 3, PIXELS, PIXELS)


def vit(scale: Scale = "test") -> Made:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=PIXELS,
        patch_size=8,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        hidden_dropout_prob=0.1,
    )
    labels = torch.randint(LABELS, (BATCH[scale],))
    model = ViTForImageClassification(config).train()
    return model, {"pixel_values": _images(scale), "labels": labels}


def swin(scale: Scale = "test") -> Made:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=PIXELS,
        patch_size=4,
        embed_dim=32,
        depths=[2, 2, 2],
        num_heads=[2, 4, 8],
        window_size=4,
    )
    labels = torch.randint(LABELS, (BATCH[scale],))
    model = SwinForImageClassification(config).train()
    return model, {"pixel_values": _images(scale), "labels": labels}


def clip(scale: Scale = "test") -> Made:
    from transformers import CLIPConfig, CLIPModel

    width = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    vocabulary, tokens = 256, 32
    config = CLIPConfig(
        text_config={
            **width,
            "vocab_size": vocabulary,
            "max_position_embeddings": tokens,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": vocabulary - 1,
        },
        vision_config={**width, "image_size": PIXELS, "patch_size": 8},
        projection_dim=64,
    )
    text = torch.randint(2, vocabulary - 1, (BATCH[scale], tokens))
    text[:, -1] = vocabulary - 1
    model = CLIPModel(config).train()
    return model, {"input_ids": text, "pixel_values": _images(scale), "return_loss": True}
