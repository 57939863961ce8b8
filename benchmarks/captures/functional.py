"""Parameters in unusual places: adapters, ties, functional calls, derivatives inside the forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

from benchmarks.captures.case import Case, waves
from rematerialize.zoo.spec import Made

WIDTH, ROWS = 16, 12


def network(inputs: int = WIDTH, outputs: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, outputs)
    )


class LowRank(nn.Module):
    """LoRA by hand (Hu et al., 2021): a frozen layer plus a product of two thin matrices."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / 4)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.dropout(x, 0.1) @ self.down.T @ self.up.T


def lora() -> Made:
    model = network()
    for index in (0, 2):
        model[index] = LowRank(model[index])
    return model, (waves(ROWS, WIDTH),)


def peft_lora() -> Made:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["0", "2"], init_lora_weights=False)
    return get_peft_model(network(), config).train(), (waves(ROWS, WIDTH),)


class Tied(nn.Module):
    """An embedding that is the output layer, too, and one block used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(24, WIDTH), network()
        self.again = self.block
        self.out = nn.Linear(WIDTH, 24, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return F.cross_entropy(self.out(self.again(self.block(self.embed(words)))), words.roll(1))


class FunctionOfParameters(nn.Module):
    """A plain function of a dict of parameters."""

    def __init__(self, function: Callable[..., Tensor], parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        self.values = nn.ParameterDict(parameters)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(dict(self.values.items()), x)


def two_layers(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return (x @ p["first"]).tanh() @ p["second"]


def plain_function() -> Made:
    parameters = {"first": torch.randn(WIDTH, WIDTH) / 4, "second": torch.randn(WIDTH, WIDTH) / 4}
    return FunctionOfParameters(two_layers, parameters), (waves(ROWS, WIDTH),)


class FromOneVector(nn.Module):
    """All weights of a network are slices of one vector, put in by a functional call."""

    def __init__(self) -> None:
        super().__init__()
        template = network()
        self.shapes = {name: value.shape for name, value in template.named_parameters()}
        self.vector = nn.Parameter(torch.cat([value.detach().flatten() for value in template.parameters()]))
        self.template = [template.requires_grad_(False).to("meta")]

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.vector.split([shape.numel() for shape in self.shapes.values()])
        named = {name: piece.view(self.shapes[name]) for name, piece in zip(self.shapes, pieces, strict=True)}
        return functional_call(self.template[0], named, (x,))


class Scaled(nn.Module):
    """A functional call of an own submodule with changed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = network(), nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor) -> Tensor:
        named = {name: value * self.scale for name, value in self.inner.named_parameters()}
        return functional_call(self.inner, named, (x,))


def bound_method() -> Made:
    """A forward that is another object's method, set on the instance."""
    model, helper = network(), network()
    model.add_module("helper", helper)
    own = model.forward
    model.forward = lambda x: own(x) + helper(x)
    return model, (waves(ROWS, WIDTH),)


class Ensemble(nn.Module):
    """Several networks at once: their stacked weights under vmap."""

    def __init__(self) -> None:
        super().__init__()
        members = [network() for _ in range(3)]
        stacked, _ = stack_module_state(members)
        self.values = nn.ParameterDict({name.replace(".", "-"): value.detach() for name, value in stacked.items()})
        self.template = [copy.deepcopy(members[0]).to("meta")]

    def forward(self, x: Tensor) -> Tensor:
        named = {name.replace("-", "."): value for name, value in self.values.items()}
        return vmap(lambda own, x: functional_call(self.template[0], own, (x,)), (0, None))(named, x)


class Field(nn.Module):
    """A scalar field over two coordinates; subclasses return the residual of an equation."""

    def __init__(self) -> None:
        super().__init__()
        self.field = network(2, 1)

    def at(self, point: Tensor) -> Tensor:
        return self.field(point).squeeze(-1)


class ByAutograd(Field):
    def forward(self, points: Tensor) -> Tensor:
        points = points.requires_grad_()
        (slope,) = torch.autograd.grad(self.at(points).sum(), points, create_graph=True)
        (second,) = torch.autograd.grad(slope[:, 0].sum(), points, create_graph=True)
        return (second[:, 0] - slope[:, 1]).square().mean()


class ByGrad(Field):
    def forward(self, points: Tensor) -> Tensor:
        slope = vmap(grad(self.at))(points)
        return (slope.square().sum(1) - 1).square().mean()


class ByJacrev(Field):
    def forward(self, points: Tensor) -> Tensor:
        return vmap(jacrev(jacrev(self.at)))(points).diagonal(dim1=1, dim2=2).sum(1).square().mean()


class ByHessian(Field):
    def forward(self, points: Tensor) -> Tensor:
        return vmap(hessian(self.at))(points).diagonal(dim1=1, dim2=2).sum(1).square().mean()


class ByJvp(Field):
    def forward(self, points: Tensor) -> Tensor:
        along = torch.zeros_like(points)
        along[:, 0] = 1
        value, slope = jvp(self.at, (points,), (along,))
        return (slope + value).square().mean()


class InnerStep(nn.Module):
    """One gradient step on the support set, the loss on the query set (MAML, Finn et al., 2017)."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.functional = functional
        self.inner, self.rate = network(), nn.Parameter(torch.tensor(0.1))

    def loss(self, named: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(self.inner, named, (x,)), y)

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        named = dict(self.inner.named_parameters())
        if self.functional:
            gradients = grad(self.loss)(named, support, support.roll(1, 0))
        else:
            loss = self.loss(named, support, support.roll(1, 0))
            found = torch.autograd.grad(loss, list(named.values()), create_graph=True)
            gradients = dict(zip(named, found, strict=True))
        adapted = {name: value - self.rate * gradients[name] for name, value in named.items()}
        return self.loss(adapted, query, query.roll(1, 0))


def on_rows(kind: Callable[..., nn.Module]) -> Any:
    return lambda: (kind(), (waves(ROWS, WIDTH),))


def on_points(kind: Callable[..., nn.Module]) -> Any:
    return lambda: (kind(), (waves(ROWS, 2),))


def meta(functional: bool) -> Any:
    return lambda: (InnerStep(functional), (waves(ROWS, WIDTH), waves(ROWS, WIDTH).cos()))


_ADAPTERS, _CALLS, _DERIVATIVES = "Adapters and ties", "Functional calls", "Derivatives inside the forward"

CASES = (
    Case("lora", _ADAPTERS, lora),
    Case("lora_peft", _ADAPTERS, peft_lora, needs="peft"),
    Case("tied_weights", _ADAPTERS, lambda: (Tied(), (torch.arange(20) * 7 % 24,))),
    Case("plain_function", _CALLS, plain_function),
    Case("weights_from_one_vector", _CALLS, on_rows(FromOneVector)),
    Case("functional_call_of_submodule", _CALLS, on_rows(Scaled)),
    Case("forward_set_on_instance", _CALLS, bound_method),
    Case("ensemble_vmap", _CALLS, on_rows(Ensemble)),
    Case("pinn_autograd_grad", _DERIVATIVES, on_points(ByAutograd)),
    Case("pinn_func_grad", _DERIVATIVES, on_points(ByGrad)),
    Case("pinn_jacrev", _DERIVATIVES, on_points(ByJacrev)),
    Case("pinn_hessian", _DERIVATIVES, on_points(ByHessian)),
    Case("pinn_jvp", _DERIVATIVES, on_points(ByJvp)),
    Case("maml_func", _DERIVATIVES, meta(True)),
    Case("maml_autograd", _DERIVATIVES, meta(False)),
)
