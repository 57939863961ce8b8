"""The pieces that recipes name: each takes values of a frame and adds a value, or changes one in place.

Values stay of order one whatever is combined, so that no difference hides behind an infinity or a NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.fuzz.recipe import Piece, Recipe

Made = nn.Module | None


class Frame:
    """The values that a forward has so far; the newest is the last."""

    def __init__(self, model: Fuzzed, tokens: Tensor, values: Sequence[Tensor]) -> None:
        self.model = model
        self.tokens = tokens
        self.values = list(values)

    def home(self, pick: int) -> Tensor:
        """A value of the home shape."""
        return _pick([v for v in self.values if v.shape == self.model.shape], pick)

    def any(self, pick: int) -> Tensor:
        return _pick(self.values, pick)

    def like(self, value: Tensor, pick: int) -> Tensor:
        """A value of the same shape; the value itself counts."""
        return _pick([v for v in self.values if v.shape == value.shape], pick)


def _settled(value: Tensor, into: Tensor) -> Tensor:
    """What may be written into an input: nothing that would give it a gradient's history."""
    return value if into.requires_grad else value.detach()


def _pick(values: Sequence[Tensor], pick: int) -> Tensor:
    return values[-1 - pick % len(values)]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a piece does (returns the new value, or None) and the module that it owns."""

    run: Callable[[Frame, Piece, Any], Tensor | None]
    make: Callable[[tuple[int, ...], Piece], Made] | None = None


PIECES: dict[str, Kind] = {}
Run = Callable[[Frame, Piece, Any], Tensor | None]


def piece(name: str, make: Callable[[tuple[int, ...], Piece], Made] | None = None) -> Callable[[Run], Run]:
    def register(run: Run) -> Run:
        PIECES[name] = Kind(run, make)
        return run

    return register


class Fuzzed(nn.Module):
    """The module that a recipe describes. Its forward takes two tensors of the home shape, and tokens."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.shape = torch.Size(recipe.shape)
        self.recipe = recipe
        self.plain_regions = False  # run checkpointed regions without checkpointing
        self.tied = nn.Linear(self.shape[-1], self.shape[-1])
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ema", torch.zeros(self.shape[-1]))
        self.register_buffer("queue", torch.zeros(4, self.shape[-1]))
        self.parts = nn.ModuleList()
        for found in recipe.walk():
            make = PIECES[found.name].make
            self.parts.append((make and make(self.shape, found)) or nn.Identity())
        self.to(memory_format=recipe.layout)  # type: ignore[call-overload]
        for index, parameter in enumerate(self.parameters()):
            parameter.requires_grad_(not recipe.frozen >> index % 8 & 1)

    def forward(self, x: Tensor, y: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        frame = Frame(self, tokens, [y, x])
        run_body(frame, self.recipe.pieces, 0)
        outputs = tuple(frame.any(pick) for pick in self.recipe.outputs)
        if self.recipe.loss == "inside":
            return (mean_square(outputs[0]), *outputs[1:])
        return outputs


def size(pieces: Sequence[Piece]) -> int:
    return sum(1 + size(piece.body) for piece in pieces)


def run_body(frame: Frame, pieces: Sequence[Piece], at: int) -> None:
    for found in pieces:
        part = (at + 1, found.body) if found.body else frame.model.parts[at]
        value = PIECES[found.name].run(frame, found, part)
        if value is not None:
            frame.values.append(value)
        at += 1 + size(found.body)


def mean_square(value: Tensor) -> Tensor:
    value = value if value.is_floating_point() else value.float()
    return (value * value.detach().abs().add(0.5)).abs().mean()


def inner(frame: Frame, region: Any, value: Tensor) -> Tensor:
    """Run a region's body on one value; its newest value of the home shape comes back."""
    if not isinstance(region, tuple):
        return value * 1.0
    at, body = region
    nested = Frame(frame.model, frame.tokens, [value])
    run_body(nested, body, at)
    return nested.home(0)


# Layers.


@piece("linear", lambda shape, p: nn.Linear(shape[-1], shape[-1], bias=p.k % 2 == 0))
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    return own(f.home(p.a))


@piece("tied")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.home(p.a)
    return F.linear(x, f.model.tied.weight.t()) if p.k % 2 else f.model.tied(x)


def _conv(shape: tuple[int, ...], p: Piece) -> Made:
    channels = shape[1] if len(shape) > 2 else 1
    kind = nn.Conv2d if len(shape) == 4 else nn.Conv1d
    groups = channels if p.k % 3 == 2 else 1
    return kind(channels, channels, 3, padding=1, bias=p.k % 2 == 0, groups=groups)


@piece("conv", _conv)
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.home(p.a)
    return own(x.unsqueeze(1)).squeeze(1) if x.dim() == 2 else own(x)


@piece(
    "conv_transpose", lambda shape, p: nn.ConvTranspose2d(shape[1], shape[1], 3, padding=1) if len(shape) == 4 else None
)
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    return own(f.home(p.a))


@piece("pool")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.home(p.a)
    if x.dim() == 4 and x.shape[-1] > 1:
        pooled = F.max_pool2d(x, 2) if p.k % 2 else F.avg_pool2d(x, 2)
        return F.interpolate(pooled, scale_factor=2.0, mode="nearest")
    if x.dim() == 4:
        return F.interpolate(F.adaptive_avg_pool2d(x, 1), x.shape[2:], mode="bilinear") + x
    wide = x if x.dim() == 3 else x.unsqueeze(1)
    return (F.max_pool1d(wide, 3, 1, 1) if p.k % 2 else F.avg_pool1d(wide, 3, 1, 1)).view(x.shape)


def _batch_norm(shape: tuple[int, ...], p: Piece) -> Made:
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    options = ({}, {"momentum": 0.3}, {"affine": False}, {"track_running_stats": False})[p.k % 4]
    return kind(shape[1], **({"momentum": None} if p.k == 23 else options))


@piece("batch_norm", _batch_norm)
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.home(p.a)
    return own(own(x)) if p.k >= 6 else own(x)


@piece("batch_norm_eval", lambda shape, p: (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1]).eval())
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    return own(f.home(p.a))


@piece("layer_norm", lambda shape, p: nn.LayerNorm(shape[-1], elementwise_affine=p.k % 2 == 0))
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    return own(f.home(p.a))


@piece("rms_norm", lambda shape, p: nn.RMSNorm(shape[-1]))
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    return own(f.home(p.a))


@piece("group_norm", lambda shape, p: nn.GroupNorm(1 if p.k % 2 or shape[1] % 2 else 2, shape[1]))
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.home(p.a)
    # Eager's backward on the CPU writes to a null pointer (torch 2.13) for channels last without the input's gradient.
    return own(x if x.requires_grad else x.clone(memory_format=torch.contiguous_format))


@piece(
    "instance_norm",
    lambda shape, p: (
        nn.InstanceNorm2d(shape[1], affine=True, track_running_stats=p.k % 2 == 1) if len(shape) == 4 else None
    ),
)
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    return own(f.home(p.a))


@piece("embedding", lambda shape, p: nn.Embedding(7, shape[-1], padding_idx=0 if p.k % 2 else None))
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    return f.home(p.a) + own(f.tokens)


@piece("lstm_cell", lambda shape, p: (nn.GRUCell if p.k % 2 else nn.LSTMCell)(shape[-1], shape[-1]))
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.home(p.a)
    rows = x.reshape(-1, x.shape[-1])
    state = None
    for _ in range(2):
        state = own(rows, state)
    hidden = state if isinstance(state, Tensor) else state[0] + state[1]
    return hidden.view(x.shape)


@piece("lstm", lambda shape, p: (nn.GRU if p.k % 2 else nn.LSTM)(shape[-1], shape[-1], batch_first=True))
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.home(p.a)
    return own(x.reshape(x.shape[0], -1, x.shape[-1]))[0].reshape(x.shape)


@piece("attention", lambda shape, p: nn.Linear(shape[-1], 3 * shape[-1]))
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.home(p.a)
    packed = own(x.reshape(x.shape[0], -1, x.shape[-1]))
    q, k, v = packed.view(*packed.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
    dropout = 0.3 if p.k % 2 else 0.0
    mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=p.k % 4 > 1)
    return mixed.transpose(1, 2).reshape(x.shape)


@piece(
    "multihead",
    lambda shape, p: nn.MultiheadAttention(shape[-1], 2 - shape[-1] % 2, dropout=0.2 * (p.k % 2), batch_first=True),
)
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.home(p.a)
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    return own(rows, rows, rows, need_weights=p.k % 4 > 1)[0].reshape(x.shape)


@piece("scale", lambda shape, p: _Scale(shape[-1]))
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.any(p.a)
    return x * own.scalar if p.k % 2 or x.shape[-1:] != own.row.shape else own.row * x


class _Scale(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.linspace(0.5, 1.5, features))
        self.scalar = nn.Parameter(torch.tensor(0.7))


@piece("prelu", lambda shape, p: nn.PReLU())
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    return own(f.any(p.a))


# Activations.

_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.relu, F.gelu, F.silu, torch.tanh, torch.sigmoid, F.elu, F.leaky_relu, F.hardtanh, F.softplus, torch.abs,
    torch.sin, F.mish, F.hardswish, F.relu6, F.selu, F.logsigmoid, lambda x: F.gelu(x, approximate="tanh"),
    lambda x: torch.exp(-x.abs()), lambda x: x.clamp(-0.5, 0.7), lambda x: torch.sqrt(x.abs() + 0.1),
)  # fmt: skip
_IN_PLACE: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.relu_, lambda x: F.silu(x, inplace=True), torch.tanh_, torch.sigmoid_, lambda x: F.elu(x, inplace=True),
    lambda x: F.leaky_relu(x, inplace=True), lambda x: F.hardtanh(x, inplace=True),
    lambda x: F.hardswish(x, inplace=True), lambda x: F.mish(x, inplace=True), lambda x: F.relu6(x, inplace=True),
    lambda x: F.selu(x, inplace=True),
)  # fmt: skip


@piece("activation")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    return _ACTIVATIONS[p.k % len(_ACTIVATIONS)](f.any(p.a))


@piece("activation_")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    return _IN_PLACE[p.k % len(_IN_PLACE)](f.any(p.a))


@piece("layer_activation_", lambda shape, p: nn.Linear(shape[-1], shape[-1]))
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    return _IN_PLACE[p.k % len(_IN_PLACE)](own(f.home(p.a)))


@piece("softmax")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.any(p.a)
    return F.log_softmax(x, -1) * 0.3 if p.k % 2 else torch.softmax(x, -1)


# Joins.

_JOINS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda a, b: (a + b) * 0.5, lambda a, b: a * torch.tanh(b), lambda a, b: a - b, torch.maximum,
    lambda a, b: torch.where(a > b, a, b * 0.5), lambda a, b: torch.lerp(a, b, 0.3),
    lambda a, b: a / (1.0 + b.abs()), lambda a, b: torch.addcmul(a, torch.tanh(a), torch.tanh(b), value=0.5),
    torch.add,
)  # fmt: skip


@piece("join")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    a = f.any(p.a)
    return _JOINS[p.k % len(_JOINS)](a, f.like(a, p.b))


@piece("cat")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    a = f.home(p.a)
    b = f.home(p.b)
    width = a.shape[-1]
    both = torch.cat([a, b], -1)
    return (both[..., width // 2 : width // 2 + width], both[..., ::2], both.unflatten(-1, (2, width)).mean(-2))[
        p.k % 3
    ]


@piece("cat_layer", lambda shape, p: nn.Linear(2 * shape[-1], shape[-1]))
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    return own(torch.cat([f.home(p.a), f.home(p.b)], -1))


@piece("stack")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    a = f.home(p.a)
    both = torch.stack([a, f.home(p.b), a])
    return both.sum(0) * 0.4 if p.k % 2 else both.amax(0)


@piece("product")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    a, b = f.home(p.a), f.home(p.b)
    scores = torch.softmax(a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1]), -1)
    return torch.einsum("...ij,...jd->...id", scores, b) if p.k % 2 else scores @ b


# In-place arithmetic.


@piece("arithmetic_")
def _(f: Frame, p: Piece, own: Any) -> Tensor | None:
    x = f.any(p.a)
    other = _settled(f.like(x, p.b), x)
    changes: tuple[Callable[[], Tensor], ...] = (
        lambda: x.add_(0.1), lambda: x.mul_(0.9), lambda: x.add_(other, alpha=0.5), lambda: x.sub_(0.2),
        lambda: x.div_(1.3), lambda: x.clamp_(-1.0, 1.0), lambda: x.neg_(), lambda: x.copy_(other * 0.5),
        lambda: x.zero_(), lambda: x.fill_(0.3), lambda: x.masked_fill_(x.detach() > 0.5, 0.25),
        lambda: x.addcmul_(torch.tanh(other), torch.ones_like(x), value=0.3),
    )  # fmt: skip
    changes[p.k % len(changes)]()
    return None


@piece("copy_then_")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.any(p.a)
    copy = (x.clone(), x * 1.0, x.contiguous().clone(), x + 0.0)[p.b % 4]
    return (copy.mul_(0.8), copy.add_(x), torch.relu_(copy), copy.exp_().clamp_(max=2.0), copy.tanh_())[p.k % 5]


# Views, and writes through them.


def _view(x: Tensor, k: int) -> Tensor:
    views: tuple[Callable[[], Tensor], ...] = (
        lambda: x.transpose(0, -1), lambda: x[..., 1:], lambda: x[0], lambda: x.reshape(-1), lambda: x[..., ::2],
        lambda: x.unsqueeze(0), lambda: x.chunk(2, -1)[-1], lambda: x.detach(), lambda: x.expand(2, *x.shape),
        lambda: x.narrow(0, 0, 1), lambda: x.flatten().view(x.shape), lambda: x.split(1, 0)[-1],
        lambda: x.unbind(-1)[0], lambda: x.view_as(x), lambda: x.diagonal(dim1=0, dim2=-1),
        lambda: x.as_strided(x.shape, x.stride()), lambda: x.permute(*reversed(range(x.dim()))),
        lambda: x.T if x.dim() == 2 else x.mT,
        lambda: x.unfold(-1, 2, 1), lambda: x.squeeze(), lambda: x[...],
    )  # fmt: skip
    return views[k % len(views)]()


@piece("view")
def _(f: Frame, p: Piece, own: Any) -> Tensor | None:
    x = f.any(p.a)
    return _view(x, p.k) if x.dim() > 1 else x.view(-1, 1)


@piece("view_of_new")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    """A value and a view of it, both to go on with."""
    fresh = torch.tanh(f.home(p.a)) if p.b % 2 else f.home(p.a) * 0.7
    f.values.append(fresh)
    return _view(fresh, p.k)


@piece("view_back")
def _(f: Frame, p: Piece, own: Any) -> Tensor | None:
    """From any shape to the home shape, by repetition or cutting."""
    x = f.any(p.a).reshape(-1)
    needed = math.prod(f.model.shape)
    times = -(-needed // x.numel())
    return x.repeat(times)[:needed].view(f.model.shape)


@piece("contiguous")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.any(p.a)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and p.k % 2 else x.contiguous()


@piece("write")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    """Write into a part of a copy (b even) or of the value itself."""
    x = f.home(p.a)
    x = x if p.b % 2 else x.clone()
    other = _settled(f.home(p.b), x)
    half = x.shape[-1] // 2
    mask = torch.arange(x.shape[-1], device=x.device) % 3 == 0
    writes: tuple[Callable[[], Any], ...] = (
        lambda: x[..., :half].mul_(0.5), lambda: x[..., half:].copy_(other[..., : x.shape[-1] - half]),
        lambda: x[0].zero_(), lambda: x[:, 0].add_(1.0), lambda: x[..., ::2].tanh_(),
        lambda: x.transpose(0, 1)[0].mul_(0.3), lambda: x.view(-1)[:5].fill_(0.2),
        lambda: x[1:][..., :half].sub_(0.1), lambda: x.diagonal(dim1=0, dim2=-1).mul_(2.0),
        lambda: x.__setitem__((..., mask), 0.4), lambda: x.__setitem__((..., slice(0, half)), x[..., half : 2 * half]),
        lambda: x.masked_fill_(mask, -0.1), lambda: x.select(-1, 0).copy_(x.select(-1, 1)),
        lambda: x.__setitem__(torch.tensor([0, 1]), other[torch.tensor([1, 0])]),
        lambda: torch.sigmoid_(x.flatten(0, 1)[1:]), lambda: x[..., -1:].add_(other[..., :1]),
        lambda: x.chunk(2, -1)[0].relu_(), lambda: x.narrow(0, 1, 1).neg_(),
    )  # fmt: skip
    writes[p.k % len(writes)]()
    return x


@piece("index")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x, other = f.home(p.a), f.home(p.b)
    order = (torch.arange(x.shape[-1], device=x.device) * 3 + 1) % x.shape[-1]
    wide = order.expand_as(x)
    rows = torch.arange(x.shape[0], device=x.device).flip(0) // 2
    kinds: tuple[Callable[[], Tensor], ...] = (
        lambda: x.index_select(-1, order), lambda: x.gather(-1, wide), lambda: x[rows],
        lambda: x.scatter(-1, wide, other), lambda: x.scatter_add(-1, wide, other), lambda: x.index_add(0, rows, other),
        lambda: x.clone().index_copy_(-1, order, other), lambda: x.index_put((rows,), other, accumulate=True),
        lambda: x.roll(1, -1), lambda: x.flip(0), lambda: x.cumsum(-1) * 0.2, lambda: x.sort(-1)[0],
        lambda: torch.take_along_dim(x, x.detach().argsort(-1), -1), lambda: x.clone().scatter_add_(-1, wide, other),
        lambda: F.pad(x, (1, 0))[..., :-1], lambda: x.tril() if x.dim() > 1 else x,
        lambda: x.topk(2, -1)[0].sum(-1, keepdim=True) + x,
        lambda: x.index_fill(-1, order[:2], 0.1), lambda: x.scatter_reduce(-1, wide, other, "amax"),
        lambda: x.masked_scatter(other > 0, other),
        lambda: x.index_select(0, rows).clone().index_add_(0, rows, other, alpha=0.5),
    )  # fmt: skip
    return kinds[p.k % len(kinds)]()


@piece("reduce")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.any(p.a)
    kinds: tuple[Callable[[], Tensor], ...] = (
        lambda: x.mean(-1, keepdim=True), lambda: x.sum(0) * 0.1, lambda: x.var(-1, keepdim=True, correction=0),
        lambda: x.amax(-1, keepdim=True), lambda: x.logsumexp(-1), lambda: x.norm(), lambda: x.std(0, correction=0),
        lambda: x.prod(-1).tanh(), lambda: x.mean(),
    )  # fmt: skip
    return f.home(p.b) * 0.5 + kinds[p.k % len(kinds)]().sum()


@piece("loss")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    """Fused losses keep more than they show."""
    x, y = f.home(p.a).reshape(-1, f.model.shape[-1]), f.home(p.b).reshape(-1, f.model.shape[-1])
    target = f.tokens.reshape(-1) % x.shape[-1]
    kinds: tuple[Callable[[], Tensor], ...] = (
        lambda: F.cross_entropy(x, target), lambda: F.mse_loss(x, y), lambda: F.smooth_l1_loss(x, y),
        lambda: F.binary_cross_entropy_with_logits(x, torch.sigmoid(y)),
        lambda: F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="batchmean"),
        lambda: F.cosine_similarity(x, y, dim=-1).mean(), lambda: F.huber_loss(x, y), lambda: F.l1_loss(x, y),
    )  # fmt: skip
    return kinds[p.k % len(kinds)]()


@piece("add_all")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    """Every value takes part, whatever its shape."""
    total = f.home(p.a) * 0.5
    for value in f.values:
        total = total + value.mean() * 0.3
    return total


# Random numbers.

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout, F.dropout3d)
_DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _shaped_for(kind: int, x: Tensor) -> Tensor:
    """Channel dropouts want their own number of dimensions, or warn."""
    dims = {1: 3, 2: 4, 4: 4, 5: 5}.get(kind)
    if dims is None or x.dim() == dims:
        return x
    return x.reshape(*x.shape[:2], *([1] * (dims - 3)), -1) if x.dim() > 1 else x


@piece("dropout", lambda shape, p: _DROPOUT_MODULES[p.k % 5](0.3))
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.home(p.a)
    return own(_shaped_for(p.k % 5, x)).reshape(x.shape)


@piece("dropout_")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.home(p.a)
    x = x if p.b % 2 else x * 0.9
    return _DROPOUTS[p.k % 6](_shaped_for(p.k % 6, x), 0.25, True, True).reshape(x.shape)


NOISES, RRELUS = 22, (10, 15)


@piece("noise")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.any(p.a)
    kinds: tuple[Callable[[], Tensor], ...] = (
        lambda: x + torch.rand_like(x), lambda: x + 0.1 * torch.randn_like(x),
        lambda: x * torch.bernoulli(torch.full_like(x, 0.7)),
        lambda: x * torch.bernoulli(torch.sigmoid(x.detach())), lambda: x + torch.rand(x.shape, device=x.device),
        lambda: x + torch.empty_like(x).normal_(0.0, 0.2), lambda: x * torch.empty_like(x).uniform_(0.5, 1.0),
        lambda: x + torch.randn(x.shape[-1:], device=x.device), lambda: x * torch.empty_like(x).bernoulli_(0.6),
        lambda: x + torch.randint(0, 3, x.shape, device=x.device), lambda: F.rrelu(x, training=True),
        lambda: x + 0.1 * torch.empty_like(x).exponential_().clamp(max=3.0), lambda: torch.normal(x.detach(), 0.1) * x,
        lambda: F.gumbel_softmax(x, dim=-1), lambda: x[..., torch.randperm(x.shape[-1], device=x.device)],
        lambda: F.rrelu(x * 1.0, training=True, inplace=True), lambda: x * torch.rand_like(x).gt(0.4),
        lambda: x + torch.multinomial(torch.softmax(x.detach().reshape(-1, x.shape[-1]), -1), 1).sum(),
        lambda: x * torch.bernoulli(torch.rand_like(x)), lambda: F.dropout(torch.ones_like(x), 0.5) * x,
        lambda: x.mul(torch.zeros_like(x).bernoulli_(torch.full_like(x, 0.4))),
        lambda: x + torch.poisson(x.detach().abs()) * 0.1,
    )  # fmt: skip
    assert len(kinds) == NOISES
    return kinds[p.k % len(kinds)]()


# Buffers.


@piece("buffer")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    model, x = f.model, f.home(p.a)
    row = x.detach().reshape(-1, x.shape[-1]).mean(0)

    def count() -> Tensor:
        model.steps.add_(1)
        return x + model.steps * 0.1

    def read_then_count() -> Tensor:
        out = x * (model.steps * 0.1 + 1.0)
        model.steps.add_(1)
        return out

    def average() -> Tensor:
        model.ema.mul_(0.9).add_(row, alpha=0.1)
        return x - model.ema

    def read_then_average() -> Tensor:
        out = torch.tanh(x - model.ema) * model.ema.add(0.5)
        model.ema.lerp_(row, 0.2)
        return out

    def enqueue() -> Tensor:
        model.queue[p.b % 4].copy_(row)
        return x + torch.softmax(x @ model.queue.t(), -1) @ model.queue * 0.3

    def roll() -> Tensor:
        out = x * model.queue.mean(0).add(1.0)
        model.queue.copy_(torch.cat([model.queue[1:], row[None]]))
        return out

    def count_whole() -> Tensor:
        model.seen += x.shape[0]
        return x / (1.0 + model.seen.float() * 0.01)

    def twice() -> Tensor:
        model.ema.add_(row * 0.1)
        out = x * model.ema
        model.ema.mul_(0.5)
        return out + model.ema

    def noisy() -> Tensor:
        model.queue.uniform_(-0.1, 0.1)
        return x + model.queue[0]

    def slice_of() -> Tensor:
        view = model.queue[:2]
        out = x * view[0].add(1.0)
        view.add_(row * 0.1)
        return out + view[1]

    kinds = (count, read_then_count, average, read_then_average, enqueue, roll, count_whole, twice, noisy, slice_of)
    return kinds[p.k % len(kinds)]()


# Regions.


@piece("checkpoint")
def _(f: Frame, p: Piece, region: Any) -> Tensor:
    if f.model.plain_regions:
        return inner(f, region, f.home(p.a) * 1.0)
    # On a copy: what the region changes in its own argument, eager's recomputation changes a second time.
    x = f.home(p.a)
    result = checkpoint(lambda x: inner(f, region, x * 1.0), x, use_reentrant=(p.k, p.b) == (23, 5) and x.requires_grad)
    assert isinstance(result, Tensor)
    return result


@piece("autocast")
def _(f: Frame, p: Piece, region: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=p.k % 5 != 4):
        return inner(f, region, f.home(p.a)).float()


@piece("no_grad")
def _(f: Frame, p: Piece, region: Any) -> Tensor:
    x = f.home(p.a)
    with torch.no_grad():
        constant = inner(f, region, x)
    return x * constant.tanh() if p.k % 2 else x + constant


@piece("residual")
def _(f: Frame, p: Piece, region: Any) -> Tensor:
    x = f.home(p.a)
    y = inner(f, region, x)
    return x + y if p.k % 2 else y.add_(x)


@piece("loop")
def _(f: Frame, p: Piece, region: Any) -> Tensor:
    """The same layers twice: weights that are used several times."""
    x = f.home(p.a)
    for _ in range(2):
        x = inner(f, region, x)
    return x


@piece("double")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.any(p.a)
    return torch.sin(x.double()).mul(0.5).float() if p.k % 2 else (x.to(torch.bfloat16) * 1.5).float()


@piece("gradient_reversal")
def _(f: Frame, p: Piece, own: Any) -> Tensor:
    x = f.any(p.a)
    result: Tensor = _Reverse.apply(x)
    return result


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 1.5

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -grad * torch.cos(x)


STATEFUL = frozenset({"buffer", "batch_norm", "batch_norm_eval", "instance_norm"})
REGIONS = ("checkpoint", "autocast", "no_grad", "residual", "loop")
PLAIN = tuple(sorted(set(PIECES) - set(REGIONS)))
