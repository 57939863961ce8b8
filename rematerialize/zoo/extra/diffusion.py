"""Diffusion models of diffusers; their loss is the denoising or reconstruction error."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rematerialize.zoo.spec import Made, Scale

BATCH = {"test": 2, "bench": 8}
PIXELS = 32


class Denoiser(nn.Module):
    """Predicts the noise and returns the loss as a trainer's step does."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, step: Tensor, context: Tensor, noise: Tensor) -> dict[str, Tensor]:
        predicted = self.unet(noisy, step, encoder_hidden_states=context).sample
        return {"loss": F.mse_loss(predicted, noise), "sample": predicted}


class Reconstruction(nn.Module):
    """Encodes, samples the posterior, decodes; loss with the KL term."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        posterior = self.autoencoder.encode(images).latent_dist
        decoded = self.autoencoder.decode(posterior.sample()).sample
        loss = F.mse_loss(decoded, images) + 1e-4 * posterior.kl().mean()
        return {"loss": loss, "sample": decoded}


def unet2d_condition(scale: Scale = "test") -> Made:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(  # type: ignore[no-untyped-call]
        sample_size=PIXELS,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        dropout=0.1,
    )
    batch = BATCH[scale]
    shape = (batch, 4, PIXELS, PIXELS)
    inputs = (
        torch.randn(shape),
        torch.randint(1000, (batch,)),
        torch.randn(batch, 8, 32),
        torch.randn(shape),
    )
    return Denoiser(unet).train(), inputs


def autoencoder_kl(scale: Scale = "test") -> Made:
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL(  # type: ignore[no-untyped-call]
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=PIXELS,
    )
    return Reconstruction(autoencoder).train(), (torch.randn(BATCH[scale], 3, PIXELS, PIXELS),)
