"""PyTorch's own cases, a part of them: each is eager's step bit for bit, or is refused for a reason listed here.

All of them: ``python -m benchmarks.conformance``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rematerialize as remat
from tests.twins import check_steps

pytest.importorskip("expecttest", reason="torch's own cases need it")

from benchmarks.conformance import generated, layouts
from benchmarks.conformance.cases import cases, names
from benchmarks.conformance.judge import judge
from benchmarks.conformance.layouts import judge_layouts
from benchmarks.conformance.records import Record, Verdict, counts, groups
from benchmarks.provenance import provenance
from rematerialize.capture import kernel_layouts

# Long sequences of kernels, which other tests train: the whole command has them.
SLOW = {"nn.GRU", "nn.LSTM", "nn.RNN", "nn.Transformer", "nn.TransformerEncoderLayer", "nn.MultiheadAttention"}
MODULES = [name for name in names("modules")[::3] if name not in SLOW]
OPERATORS = names("ops")[::9]
# What a part of the cases may be refused for.
REASONS = {
    "a shape or a branch depends on values",
    "a sparse tensor",
    "no output requires grad",
}


@pytest.fixture(autouse=True)
def one_thread(quick_plans: None) -> None:
    """Sums that threads split have an order of their own."""


def judged(suite: str, name: str, most: int) -> list[Verdict]:
    found = list(cases(suite, name))
    return [judge(case) for case in found[:: max(1, len(found) // most)][:most]]


def check(verdicts: list[Verdict]) -> None:
    assert [verdict for verdict in verdicts if verdict.status == "failed"] == []
    assert {verdict.group for verdict in verdicts if verdict.status == "refused"} <= REASONS


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_torch_trains_as_in_eager(name: str) -> None:
    check(judged("modules", name, 2))


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_of_torch_trains_as_in_eager(name: str) -> None:
    check(judged("ops", name, 1))


# Names of modules and operators whose kernels return layouts that torch's fake kernels misreport.
MISREPORTED = [
    "nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BCELoss", "nn.GELU", "nn.GroupNorm", "nn.Hardtanh", "nn.HuberLoss",
    "nn.LayerNorm", "nn.LogSigmoid", "nn.LogSoftmax", "nn.PReLU", "nn.ReLU", "nn.ReplicationPad3d", "nn.Softplus",
    "clamp", "logaddexp", "mul", "nn.functional.max_unpool2d", "nn.functional.channel_shuffle", "xlogy",
]  # fmt: skip


@pytest.mark.parametrize("name", [*MISREPORTED, *names("layouts")[5::60]])
def test_the_trace_knows_how_a_kernel_lays_out_its_result(name: str) -> None:
    check([judge_layouts(case) for case in itertools.islice(cases("layouts", name, 1), 2)])


def test_a_misreported_layout_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_layouts, "rule_for", lambda *_: None)
    monkeypatch.setattr(layouts, "_done", {})
    verdict = layouts.judge_layouts(next(cases("layouts", "nn.Hardtanh")))
    assert verdict.status == "failed"
    assert "aten.hardtanh_backward" in verdict.detail


@pytest.mark.parametrize("name", ["roll", "poisson", "index", "masked_fill"])
def test_layouts_of_ops_on_drawn_arguments_are_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = list(generated.operators([name]))
    assert ops
    assert not [told for op in ops if (told := generated.first_misreport(op, 0.5))]
    if name in ("roll", "poisson", "index"):
        monkeypatch.setattr(kernel_layouts, "rule_for", lambda *_: None)
        assert any(generated.first_misreport(op, 3.0) for op in ops)


# What these cases found.


class Of(nn.Module):
    """A function of one square parameter and the input."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], start: Tensor) -> None:
        super().__init__()
        self.function = function
        self.start = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.start, x)


def definite() -> Tensor:
    return torch.eye(4) * 4 + torch.rand(4, 4)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, x: torch.linalg.cholesky(a @ a.T) @ x,
        lambda a, x: torch.linalg.solve(a, x).tanh(),
        lambda a, x: torch.linalg.inv(a).exp() @ x,
        lambda a, x: torch.logdet(a @ a.T) * x,
    ],
)
def test_linear_algebra_is_planned(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    check_steps(lambda: Of(function, definite()), torch.rand(4, 4))


def test_a_factorization_that_fails_raises_what_eager_raises() -> None:
    model = remat.wrap(Of(lambda a, x: torch.linalg.cholesky(a) @ x, definite()), activation_budget="100%")
    model(torch.rand(4, 4)).sum().backward()
    with torch.no_grad():
        model.start.neg_()
    with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
        model(torch.rand(4, 4))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_maximum_of_a_tensor_spreads_its_gradient_as_in_eager(sign: float) -> None:
    model = Of(lambda a, x: a.max() * x - a.min(), torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    twin = Of(model.function, model.start.detach().clone())
    remat.wrap(twin, activation_budget="100%")
    for each in (model, twin):
        (sign * each(torch.ones(2, 2)).sum()).backward()
    assert torch.equal(model.start.grad, twin.start.grad)
    assert torch.equal(model.start.grad.signbit(), twin.start.grad.signbit())


@pytest.mark.parametrize("zeros", [0, 1, 2])
@pytest.mark.parametrize("dim", [None, 0, -1])
def test_the_gradient_of_a_product_is_eagers_with_and_without_zeros(zeros: int, dim: int | None) -> None:
    start = torch.linspace(0.3, 1.7, 16).view(4, 4)
    start.view(-1)[:zeros] = 0.0
    check_steps(
        lambda: Of(lambda a, x: (a.prod() if dim is None else a.prod(dim)) * x, start.clone()), torch.rand(4, 4)
    )


def written_view(a: Tensor) -> Tensor:
    y = a * 2
    y.view(2, 8).add_(a.view(2, 8))
    return y


def written_turned(a: Tensor) -> Tensor:
    y = (a * 2).t()
    y.add_(a)
    return y.t()


def product_of_written(a: Tensor) -> Tensor:
    y = torch.bmm(a[None], a[None])[0]
    return y.add_(a)


@pytest.mark.parametrize("dim", [None, 0, -1])
@pytest.mark.parametrize("change", [Tensor.t, written_view, written_turned, product_of_written, lambda a: a[1:] * 2])
def test_the_gradient_of_a_product_is_eagers_for_views_and_what_was_written_to(
    change: Callable[[Tensor], Tensor], dim: int | None
) -> None:
    def loss(a: Tensor, x: Tensor) -> Tensor:
        y = change(a)
        return (y.prod() if dim is None else y.prod(dim)).sum() * x

    check_steps(lambda: Of(loss, torch.linspace(0.3, 1.7, 16).view(4, 4)), torch.rand(4, 4))


class Smoothed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("weight", torch.rand(4) + 0.5)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.layer(x), targets, weight=self.weight, label_smoothing=0.1, ignore_index=1)


def test_class_weights_under_label_smoothing_are_added_up_as_in_eager() -> None:
    for _ in range(8):
        check_steps(Smoothed, torch.randn(24, 4), torch.randint(0, 4, (24,)))


def test_pieces_of_a_parameter_are_outputs_with_gradients() -> None:
    check_steps(lambda: Of(lambda a, x: a.chunk(2), definite()), torch.rand(4, 4))
    check_steps(lambda: Of(lambda a, x: (a, a.T), definite()), torch.rand(4, 4))


def test_a_record_tells_groups_and_counts(tmp_path: object) -> None:
    passed = Verdict("add", 0, "float32", "pass")
    refused = dataclasses.replace(passed, index=1, status="refused", detail="depends on the values of its tensors")
    assert counts([passed, refused]) == {"pass": 1, "refused": 1, "failed": 0, "skipped": 0}
    assert groups([passed, refused]) == [("refused", "a shape or a branch depends on values", 1, ["add"])]
    path = tmp_path / "record.json"  # type: ignore[operator]
    Record(provenance("benchmarks.conformance", [], ("torch",)), 1.0, {"ops": (passed, refused)}).save(path)
    assert '"add": 1' in path.read_text(encoding="utf-8")
