"""Numbers of other kinds: spectra, complex weights, sparse matrices, simulated quantization, own generators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.ao import quantization

from benchmarks.captures.case import Case, waves
from rematerialize.zoo.spec import Made

WIDTH = 16


class SpectralConvolution(nn.Module):
    """A Fourier layer: the lowest modes times complex weights."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(channels, channels, modes, modes, dtype=torch.cfloat) / channels)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x)
        out = torch.zeros_like(spectrum)
        low = spectrum[..., : self.modes, : self.modes]
        out[..., : self.modes, : self.modes] = torch.einsum("bixy,ioxy->boxy", low, self.weight)
        return torch.fft.irfft2(out, s=x.shape[-2:])


class FNO(nn.Module):
    """Fourier neural operator (Li et al., ICLR 2021), two layers."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.lift, self.head = nn.Conv2d(1, channels, 1), nn.Conv2d(channels, 1, 1)
        self.spectral = nn.ModuleList(SpectralConvolution(channels, 4) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = nn.functional.gelu(spectral(x) + local(x))
        return self.head(x)


class Spectrogram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(256, 256), nn.Linear(17, WIDTH)
        self.register_buffer("window", torch.hann_window(32))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(self.inner(x), 32, hop_length=16, window=self.window, return_complex=True)
        return self.head(spectrum.abs().square().add(1e-3).log().transpose(1, 2))


class ComplexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, dtype=torch.cfloat)
        self.second = nn.Linear(WIDTH, WIDTH, dtype=torch.cfloat)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.view_as_complex(torch.stack([x, x.cos()], -1)) * self.first(x + 0j).tanh()).abs()


class SparseAdjacency(nn.Module):
    """Two graph convolutions by a constant sparse matrix."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        dense = torch.eye(12).roll(1, 0) + torch.eye(12) * 0.5
        matrix = dense.to_sparse_csr() if layout == "csr" else dense.to_sparse()
        self.register_buffer("adjacency", matrix)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.adjacency, self.second(torch.sparse.mm(self.adjacency, self.first(x)).relu()))


class SparseInside(nn.Module):
    """A sparse matrix built in the forward from indices and computed values."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.head = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        values = self.score(x[edges[0]] + x[edges[1]]).squeeze(1)
        matrix = torch.sparse_coo_tensor(edges, values, (len(x), len(x)))
        return torch.sparse.mm(matrix, self.head(x))


class FakeQuantized(nn.Module):
    """Rounding to eight bits by the plain functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.full((WIDTH,), 0.02))
        self.register_buffer("zero", torch.zeros(WIDTH, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127)
        weight = torch.fake_quantize_per_channel_affine(self.first.weight, self.scale, self.zero, 0, -128, 127)
        x = nn.functional.linear(x, weight, self.first.bias).relu()
        return self.second(torch.fake_quantize_per_tensor_affine(x, self.scale[0], self.zero[0], -128, 127))


class Observed(nn.Module):
    """FakeQuantize modules, whose observers move with every step."""

    def __init__(self, fake: Any, weight_fake: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inputs, self.weights, self.inner = fake(), weight_fake(), fake()

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(self.inputs(x), self.weights(self.first.weight), self.first.bias)
        return self.second(self.inner(y.relu()))


class OwnGenerator(nn.Module):
    """Noise and a mask from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + 0.1 * torch.randn(x.shape, generator=self.generator)
        keep = torch.empty_like(x).bernoulli_(0.8, generator=self.generator)
        return self.second(nn.functional.dropout(x.relu() * keep / 0.8, 0.1))


class PassedGenerator(nn.Module):
    """The same with a generator that is passed in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.second((self.first(x) * torch.rand(x.shape, generator=generator)).tanh())


def observed(kind: Any) -> Any:
    symmetric = kind.with_args(quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    return lambda: (Observed(kind.with_args(dtype=torch.quint8), symmetric), (waves(8, WIDTH),))


def prepared(calls: int) -> Made:
    """torch's own preparation of a model, as its tutorial does it, and some calls to settle the observers' shapes."""
    model = nn.Sequential(
        quantization.QuantStub(),
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, WIDTH),
        quantization.DeQuantStub(),
    )
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model.train(), inplace=True)
    inputs = (waves(4, 3, 8, 8),)
    with torch.no_grad():
        for _ in range(calls):
            model(*inputs)
    return model, inputs


def sparse_inside() -> Made:
    step = torch.arange(36)
    return SparseInside(), (waves(12, WIDTH), torch.stack([step % 12, (5 * step + step // 12) % 12]))


_SPECTRA, _SPARSE, _QUANTIZED = "Spectra and complex numbers", "Sparse matrices", "Simulated quantization"
_RANDOM = "Random numbers"

CASES = (
    Case("fno", _SPECTRA, lambda: (FNO(), (waves(2, 1, 16, 16),))),
    Case("stft", _SPECTRA, lambda: (Spectrogram(), (waves(4, 256),))),
    Case("complex_weights", _SPECTRA, lambda: (ComplexNet(), (waves(8, WIDTH),))),
    Case(
        "sparse_coo_constant",
        _SPARSE,
        lambda: (SparseAdjacency("coo"), (waves(12, WIDTH),)),
        refused="is a sparse tensor (sparse_coo)",
    ),
    Case(
        "sparse_csr_constant",
        _SPARSE,
        lambda: (SparseAdjacency("csr"), (waves(12, WIDTH),)),
        refused="is a sparse tensor (sparse_csr)",
    ),
    Case("sparse_built_inside", _SPARSE, sparse_inside, refused="makes a sparse tensor at numerics.py:"),
    Case("fake_quantize_functions", _QUANTIZED, lambda: (FakeQuantized(), (waves(8, WIDTH),))),
    Case("fake_quantize_fused", _QUANTIZED, observed(quantization.FusedMovingAvgObsFakeQuantize)),
    Case("fake_quantize_observed", _QUANTIZED, observed(quantization.FakeQuantize), refused="FusedMovingAvgObs"),
    Case("prepare_qat", _QUANTIZED, lambda: prepared(1)),
    Case("prepare_qat_uncalled", _QUANTIZED, lambda: prepared(0), refused="call the model once"),
    Case("own_generator", _RANDOM, lambda: (OwnGenerator(), (waves(8, WIDTH),))),
    Case("passed_generator", _RANDOM, lambda: (PassedGenerator(), (waves(8, WIDTH), torch.Generator().manual_seed(3)))),
)
