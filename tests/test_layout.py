"""Layouts and storages of a captured step: in-place ops keep their argument's, tangents don't share one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rematerialize import wrap
from rematerialize.prepare import PreparedStep, bind_inputs, prepare
from rematerialize.torch_private import storage_key
from tests.twins import at_minimum, check_steps, plans_of, total, twins

pytestmark = pytest.mark.usefixtures("quick_plans")


class Chunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layer(x).chunk(2, -1)


class Mean(Chunks):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.layer(x).mean(),)


class ScatterTransposed(Chunks):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        turned = self.layer(x).t().clone()
        return (turned.scatter_add_(0, torch.zeros(8, 4, dtype=torch.int64), x.t()),)


class Twice(Chunks):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out = self.layer(x).relu()
        return out, out


def prepared(model: nn.Module) -> PreparedStep:
    return prepare(model, model.forward, bind_inputs(model.forward, (torch.randn(4, 8),)))


def test_each_tangent_has_a_storage_of_its_own() -> None:
    for model in (Chunks(), Twice()):
        tangents = [node.meta["val"] for node, _ in prepared(model).captured.joint.tangents]
        assert len({storage_key(tangent) for tangent in tangents}) == len(tangents) > 0


def test_an_output_that_is_returned_twice_has_one_tangent() -> None:
    assert len(prepared(Twice()).captured.joint.tangents) == 1


def test_a_view_of_a_tangent_allocates_nothing() -> None:
    targets = [op.target for op in prepared(Mean()).graph.ops]
    assert not [target for target in targets if "expand" in target]


def test_an_in_place_op_keeps_the_layout_of_what_it_changes() -> None:
    x = torch.randn(4, 8)
    for model in (ScatterTransposed, lambda: nn.GRUCell(13, 13), lambda: nn.GRU(13, 13, batch_first=True)):
        own = x if model is ScatterTransposed else torch.randn(4, 13)
        check_steps(model, own)


class NormOfRecurrence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrence = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.recurrence(x)[0])


def test_a_batch_norm_of_a_strided_tensor_has_the_layout_of_its_kernel() -> None:
    x = torch.randn(3, 5, 8)
    ours = check_steps(NormOfRecurrence, x)
    assert ours(x).stride() == (40, 8, 1)
    joint = prepare(ours := NormOfRecurrence(), ours.forward, bind_inputs(ours.forward, (x,))).captured.joint
    assert [node.meta["val"].stride() for node, _ in joint.tangents] == [(40, 8, 1)]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_leaky_rectifier_with_noise_is_laid_out_as_eagers(in_place: bool) -> None:
    class Turned(Chunks):
        def forward(self, x: Tensor) -> Tensor:
            turned = self.layer(x.transpose(0, 1)).transpose(0, 1)
            return F.rrelu(turned * 1.0, training=True, inplace=in_place)

    x = torch.randn(3, 5, 8)
    model = Turned()
    expected = model(x)
    assert expected.is_contiguous() is not in_place
    assert wrap(model, budget="80%", example_inputs=(x,))(x).stride() == expected.stride()
    check_steps(Turned, x)


def test_neighbours_by_a_transposed_index_are_reshaped() -> None:
    class Edges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(16, 3)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.head(self.layer(x)[edges.t()].reshape(edges.shape[1], -1)).relu()

    check_steps(Edges, torch.randn(9, 8), torch.randint(0, 9, (2, 30)))


def test_a_gradient_of_one_channel_goes_on_in_the_memory_format_in_which_it_arrives() -> None:
    class Upscaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = self.features(x)
            return self.head(features), F.pixel_shuffle(features, 2)

    x = torch.randn(1, 3, 14, 16).to(memory_format=torch.channels_last)
    check_steps(lambda: Upscaled().to(memory_format=torch.channels_last), x)


HEADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "expanded": lambda x, weight: x.sum(-1) * weight[0, 0],
    "expanded tangent": lambda x, weight: x.sum(-1) + weight.sum(),
    "gaps": lambda x, weight: torch.cat([x, weight.expand(x.shape[0], -1, -1)], 1).tanh(),
    "tangent with gaps": lambda x, weight: torch.cat([x, weight.expand(x.shape[0], -1, -1)], 1),
    "permuted": lambda x, weight: F.conv1d(x.transpose(1, 2), weight[:, :, None]).tanh(),
}


@pytest.mark.parametrize("head", HEADS)
def test_the_gradient_of_an_input_that_was_computed_goes_on_in_eagers_layout(head: str) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(37, 37))

        def forward(self, x: Tensor) -> Tensor:
            return HEADS[head](x, self.weight)

    eager, ours = twins(Head)
    features, x = nn.Linear(7, 37), torch.randn(19, 101, 7)
    at_minimum(ours, features(x))
    found = []
    for model in (eager, ours):
        strides: list[tuple[int, ...]] = []
        torch.manual_seed(0)
        given = features(x)
        given.register_hook(lambda gradient, strides=strides: strides.append(gradient.stride()))
        output = model(given)
        (output * torch.randn(output.shape)).square().mean().backward()
        found.append((strides, features.weight.grad, features.bias.grad, model.weight.grad))
        features.zero_grad()
    (one, *theirs), (other, *our) = found
    assert one == other
    assert all(torch.equal(a, b) for a, b in zip(theirs, our, strict=True))
    assert len(plans_of(ours)) == 1


def test_gradients_are_laid_out_as_those_that_autograd_adopts() -> None:
    """A dimension of one element may have another stride: no copy is made for it, in eager or here."""

    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.point = nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 4, 1)

        def forward(self, tokens: Tensor) -> Tensor:
            picture = tokens.transpose(1, 2).view(-1, 16, 4, 4)
            return self.point(self.layer(picture)).flatten(2).transpose(1, 2)

    tokens = torch.randn(2, 16, 16)
    torch.manual_seed(0)
    eager = Depthwise()
    ours = wrap(copy.deepcopy(eager), activation_budget="100%", example_inputs=(tokens,))
    for model in (eager, ours):
        model(tokens).square().mean().backward()
    assert eager.layer.weight.grad is not None
    assert eager.point.weight.grad is not None
    assert eager.layer.weight.grad.stride() != eager.layer.weight.stride()
    for (name, expected), found in zip(eager.named_parameters(), ours.parameters(), strict=True):
        assert expected.grad is not None
        assert found.grad is not None
        assert found.grad.stride() == expected.grad.stride(), name
        assert torch.equal(found.grad, expected.grad), name


def test_a_gradient_without_its_other_term_is_reshaped_where_no_view_can_be_taken() -> None:
    """Torch's fake kernel finds a view through the dimension of one element, which the real one refuses."""

    class Pooled(Chunks):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            features = self.layer(x)
            return features, features.transpose(-1, -2).max(-1).values

    x = torch.randn(2, 1, 4, 8)
    torch.manual_seed(0)
    eager = Pooled()
    ours = wrap(copy.deepcopy(eager), activation_budget="100%", example_inputs=(x,))
    for model in (eager, ours):
        model(x)[1].square().sum().backward()
    for (name, expected), found in zip(eager.named_parameters(), ours.parameters(), strict=True):
        assert expected.grad is not None
        assert found.grad is not None
        assert torch.equal(found.grad, expected.grad), name


class Average(nn.Module):
    """A moving average of rows, which are copied where the activation that they come from is channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x * self.weight
        hidden.masked_fill_(torch.arange(6) % 3 == 0, -0.1)
        self.average.lerp_(hidden.detach().reshape(-1, 6).mean(0), 0.2)
        return torch.tanh(hidden - self.average)


def test_rows_of_what_was_filled_in_place_are_read_before_it_is_written_over() -> None:
    x = torch.randn(3, 4, 6, 6)
    for layout in (torch.channels_last, torch.contiguous_format):
        check_steps(Average, x.contiguous(memory_format=layout))


class FillsHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.attention(x, x, x)[0].reshape(x.shape)  # a transposed view of rows
        return hidden.masked_fill_(hidden.detach() > 0.1, 0.25)


def test_a_view_of_rows_is_filled_in_place() -> None:
    """masked_fill() returns a contiguous tensor, which can't be viewed as the rows."""
    check_steps(FillsHeads, torch.randn(3, 5, 4))


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_pool_over_time_is_laid_out_as_eagers(needs_gradient: bool) -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            pooled = F.max_pool1d(x.transpose(1, 2), 3, 1, 1)
            return pooled, self.layer(pooled.transpose(1, 2).reshape(-1, 5)).tanh()

    check_steps(Pools, torch.randn(3, 8, 5).requires_grad_(needs_gradient))


class Encodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        codes = F.one_hot(classes.t(), 5)
        return codes, self.layer(codes.float())


def test_codes_of_transposed_classes_are_laid_out_as_eagers() -> None:
    check_steps(Encodes, torch.randint(0, 5, (3, 6)))


class NormsChanged(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(self.change(x * 1.0) * 1.0)
        return normed * 0.5 + normed.mean(-1, keepdim=True).sum()


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.masked_fill_(h.detach() > 0.5, 0.25),
        lambda h: h.index_fill_(1, torch.tensor([0, 2]), 0.3),
        lambda h: h.cumsum_(1),
        lambda h: h.tril_(),
        lambda h: F.rrelu(h, training=True),
        lambda h: F.rrelu_(h, training=True),
        lambda h: F.dropout(h, 0.3, training=True, inplace=True),
    ],
    ids=["masked_fill_", "index_fill_", "cumsum_", "tril_", "rrelu", "rrelu_", "dropout_"],
)
def test_formulas_see_what_was_changed_in_eagers_layout(change: Callable[[Tensor], Tensor]) -> None:
    """A norm's gradient is laid out for its input. Where a trace took that for contiguous, as masked_fill() returns it,
    the gradient was read in the wrong order.
    """
    x = torch.randn(3, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    eager, ours = twins(lambda: NormsChanged(change))
    ours = at_minimum(ours, x.clone().requires_grad_())
    gradients = []
    for model in (eager, ours):
        torch.manual_seed(1)
        given = x.clone().requires_grad_()
        gradients += torch.autograd.grad(total(model(given)), given)
    assert torch.equal(*gradients)
