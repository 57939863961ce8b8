"""What a capture makes of a model: which calls are one kernel, which storage is whose, what may run again."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import rematerialize as remat
from rematerialize.capture import Kernel, capture, normalize
from rematerialize.capture.aliasing import find_aliases, tensors_of
from rematerialize.prepare import PreparedStep, bind_inputs, matching_variant, prepare, prepare_example
from tests.twins import assert_same_step, at_minimum, run_by, step_of, twins
from tests.zoo_small import LSTM, SMALL, Loss, images, rows

pytestmark = pytest.mark.usefixtures("quick_plans")


def prepared(model: nn.Module, *inputs: Any) -> PreparedStep:
    return prepare(model, model.forward, bind_inputs(model.forward, inputs))


def targets(kernel: Kernel) -> tuple[str, ...]:
    return tuple(
        getattr(node.target, "__name__", str(node.target)) + ("_" if form else "") for node, form in kernel.calls
    )


def kernels(model: nn.Module, *inputs: Any, phase: str = "forward") -> list[tuple[str, ...]]:
    """The calls of each kernel of a phase; a trailing underscore: in place."""
    step = prepared(model, *inputs)
    return [targets(kernel) for kernel in step.kernels.kernels if kernel.phase == phase and kernel.calls]


# What is one kernel.


def test_dropout_is_a_mask_in_one_kernel_and_a_product() -> None:
    assert kernels(Loss(nn.Linear(32, 32), nn.Dropout(0.5)), rows())[:3] == [
        ("addmm.default",),
        ("empty_strided.default", "bernoulli_as_", "div.Scalar_"),
        ("mul.Tensor",),
    ]


def test_an_elementwise_op_that_alone_reads_a_result_writes_over_it() -> None:
    model = Loss(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.GELU())
    assert kernels(model, rows())[:3] == [
        ("addmm.default", "tanh.default_"),
        ("addmm.default",),  # the backward of GELU reads it, so GELU has an output of its own
        ("gelu.default",),
    ]


def test_relu_joins_its_batch_norm() -> None:
    model = Loss(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    assert ("_native_batch_norm_legit.default", "relu.default_") in kernels(model, images())


def test_a_write_into_a_slice_happens_in_place() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            shifted = torch.zeros_like(y)
            shifted[:, 1:] = y[:, :-1]
            return shifted.tanh()

    assert kernels(Shift(), rows()) == [
        ("addmm.default",),
        ("full.default", "write_through_", "tanh.default_"),
    ]


def test_circular_padding_is_one_kernel() -> None:
    model = Loss(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    assert kernels(model, images())[0] == ("empty_strided.default", *["write_through_"] * 5)


def test_gradients_that_add_up_do_so_in_place() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x).sin()).sum()

    backward = kernels(Twice(), rows(), phase="backward")
    assert [calls for calls in backward if "add.Tensor" in calls] == []
    assert sum("add.Tensor_" in calls for calls in backward) == 1


# Which storage is whose.


@pytest.mark.parametrize("name", SMALL)
def test_nodes_share_a_storage_exactly_when_their_real_tensors_do(name: str) -> None:
    torch.manual_seed(1)
    model = SMALL[name].make()
    inputs = bind_inputs(model.forward, SMALL[name].inputs)
    captured = capture(model, model.forward, inputs)
    normal = normalize(captured.joint)
    graph = normal.joint.graph
    aliases = find_aliases(graph)
    likes = [node.meta["val"] for node, _ in normal.joint.tangents]
    tangents = [torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).fill_(1) for like in likes]
    real = _values(graph, [*(slot.read().detach() for slot in captured.slots), *inputs.tensors, *tangents])
    addresses: dict[str, set[int]] = {}
    for node, value in real.items():
        for storage, (_, tensor) in zip(aliases.of[node], tensors_of(value), strict=True):
            if tensor.numel():
                addresses.setdefault(storage, set()).add(tensor.untyped_storage().data_ptr())
    several = {aliases.origin[storage].target for storage, found in addresses.items() if len(found) > 1}
    assert several <= CLAIM_TOO_MUCH
    every = [address for found in addresses.values() for address in found]
    assert len(set(every)) == len(every)


# Its fake kernel returns one tensor for the gradients of both biases, the real one two.
CLAIM_TOO_MUCH = {torch.ops.aten.mkldnn_rnn_layer_backward.default}


class _Keeping(fx.Interpreter):
    """Runs a graph with real tensors and keeps every value."""

    def __init__(self, graph: fx.Graph, owner: nn.Module) -> None:
        super().__init__(fx.GraphModule(owner, graph), garbage_collect_values=False)
        self.kept: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.kept[n.name] = result
        return result


def _values(graph: fx.Graph, arguments: list[Tensor]) -> dict[fx.Node, Any]:
    with torch.no_grad():
        keeping = _Keeping(graph, nn.Module())
        keeping.run(*arguments, enable_io_processing=False)
    return {node: keeping.kept[node.name] for node in graph.nodes if node.op != "output"}


@pytest.mark.parametrize("name", SMALL)
def test_gradients_own_storages_of_their_parameters_size(name: str) -> None:
    model = SMALL[name].make()
    graph = prepared(model, *SMALL[name].inputs).graph
    assert len(set(graph.gradients)) == len(graph.gradients)
    assert not set(graph.gradients) & {*graph.outputs, *graph.tangents, *graph.resident}
    sizes = sorted(graph.storages[name] for name in graph.gradients)
    assert sizes == sorted(p.numel() * p.element_size() for p in model.parameters())


# What may run again.


def test_batch_norm_may_run_again_and_updates_of_buffers_may_not() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(32)
            self.register_buffer("average", torch.zeros(32))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x).exp()
            self.average.lerp_(y.detach().mean(0), 0.1)
            return (y * self.average).mean()

    graph = prepared(Counting(), rows()).graph
    once = [op.target for op in graph.ops if op.phase == "forward" and not op.recomputable]
    assert sum("copy_" in target for target in once) == 2  # the average and the count of batches
    assert not any("batch_norm" in target for target in once)
    assert [op.target for op in graph.ops if "batch_norm_legit" in op.target and op.recomputable]


def test_random_ops_stay_in_eagers_order() -> None:
    graph = prepared(Loss(*(nn.Dropout(0.1 * i) for i in range(1, 4)), nn.Linear(32, 32)), rows()).graph
    states = [op for op in graph.ops if op.target == "rng_state"]
    assert len(states) == 3
    for earlier, later in itertools.pairwise(states):
        drawn = earlier.outputs[0].removesuffix(".rng") + ".drawn"
        assert drawn in later.inputs
    assert all(not op.recomputable for op in states)


def test_ops_name_the_users_line() -> None:
    graph = prepared(SMALL["sparse"].make(), *SMALL["sparse"].inputs).graph
    lines = Path(__file__).with_name("zoo_small.py").read_text(encoding="utf-8").splitlines()
    (write,) = [op for op in graph.ops if "write_through" in op.target]
    named = re.fullmatch(r"zoo_small.py:(\d+)", write.source)
    assert named is not None
    assert "shifted" in lines[int(named[1]) - 1]
    assert all(op.source for op in graph.ops if op.phase == "forward" and "." in op.target)


# Values of what is rewritten.


def _nested(z: Tensor, y: Tensor) -> Tensor:
    z[2:][:, 4:8] = y[2:, 4:8]
    return z


def _assign(key: Any, value: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def write(z: Tensor, y: Tensor) -> Tensor:
        z[key] = value(z, y)
        return z

    return write


def _overlapping(z: Tensor, y: Tensor) -> Tensor:
    z[:, :20] = y[:, :20]
    z[:, 10:] = z[:, :22].clone() * 2
    z[5:9, 3] += 1
    return z


WRITES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "slice": _assign((slice(None), slice(1, None)), lambda z, y: y[:, :-1]),
    "row": _assign(0, lambda z, y: y[1]),
    "strided": _assign((slice(None, None, 2),), lambda z, y: y[1::2]),
    "constant": _assign((slice(3, 5),), lambda z, y: torch.tensor(2.0)),
    "broadcast": _assign((slice(3, 5), slice(None)), lambda z, y: y[0]),
    "from itself, apart": _assign((slice(None), slice(16, None)), lambda z, y: z[:, :16]),
    "from itself, added": _assign((slice(None), slice(1, None)), lambda z, y: z[:, 1:] + z[:, :-1]),
    "nested": _nested,
    "overlapping": _overlapping,
    "mask": lambda z, y: z.masked_fill_(torch.arange(32) % 3 == 0, 0.5),
    "index": lambda z, y: z.index_put_((torch.tensor([3, 1, 3]),), y[:3], accumulate=True),
    "index copy": lambda z, y: z.index_copy_(1, torch.tensor([5, 2]), y[:, :2]),
    "scatter": lambda z, y: z.scatter_(1, torch.arange(64)[:, None] % 32, y[:, :1]),
    "diagonal": lambda z, y: (z.diagonal().copy_(y.diagonal() * 2), z)[1],
    "transposed": lambda z, y: (z.t()[1:].copy_(y.t()[:-1]), z)[1],
    "fill": lambda z, y: (z[:, 3].fill_(2.0), z)[1],
    "added": lambda z, y: (z[:, 3:].add_(y[:, 3:]), z)[1],
}


class Writes(nn.Module):
    def __init__(self, write: Callable[[Tensor, Tensor], Tensor], fresh: bool) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(32, 32), nn.Linear(32, 32)
        self.write, self.fresh = write, fresh

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        z = torch.zeros_like(y) if self.fresh else y.sin()
        return self.last(self.write(z, y)).tanh()


@pytest.mark.parametrize("fresh", [True, False], ids=["into zeros", "into a result"])
@pytest.mark.parametrize("name", WRITES)
def test_writes_into_parts_give_eagers_values_and_gradients(name: str, fresh: bool) -> None:
    eager, ours = twins(lambda: Writes(WRITES[name], fresh))
    at_minimum(ours, rows())
    assert_same_step(step_of(eager, rows()), step_of(ours, rows()))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padded_convolutions_are_as_in_eager(mode: str) -> None:
    eager, ours = twins(lambda: Loss(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)))
    at_minimum(ours, images())
    assert_same_step(step_of(eager, images()), step_of(ours, images()))


class DropsOut(nn.Module):
    def __init__(self, arrange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.arrange = nn.Linear(32, 32), arrange

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.arrange(self.linear(x)), 0.5).sum() + torch.rand_like(x).mean()


ARRANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": Tensor.t,
    "heads": lambda y: y.view(4, 16, 2, 16).transpose(1, 2),
    "strided": lambda y: y[:, ::2],
    "expanded": lambda y: y[:1].expand(64, 32),
    "channels last": lambda y: y.reshape(4, 2, 8, 32).contiguous(memory_format=torch.channels_last),
    "double": Tensor.double,
}


@pytest.mark.parametrize(
    "name",
    ARRANGED,
)
def test_a_dropout_mask_falls_on_the_elements_on_which_it_falls_in_eager(name: str) -> None:
    eager, ours = twins(lambda: DropsOut(ARRANGED[name]))
    at_minimum(ours, rows())
    assert_same_step(step_of(eager, rows()), step_of(ours, rows()))


RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda y: F.dropout(y, 0.3),
    "feature dropout": lambda y: F.dropout2d(y.view(4, 16, 4, 8), 0.3),
    "alpha dropout": lambda y: F.alpha_dropout(y, 0.3, training=True),
    "randn": lambda y: y + torch.randn(32),
    "rand_like": lambda y: y * torch.rand_like(y),
    "normal_": lambda y: y + torch.empty(64, 32).normal_(0.5, 2.0),
    "uniform_ on a transposed": lambda y: y + torch.empty(32, 64).t().uniform_(-1, 1),
    "bernoulli of a tensor": lambda y: y * torch.bernoulli(y.detach().sigmoid()),
    "randint": lambda y: y * torch.randint(0, 3, (64, 32)),
    "randperm": lambda y: y[torch.randperm(64)],
    "rrelu": lambda y: F.rrelu(y, training=True),
    "gumbel": lambda y: F.gumbel_softmax(y, tau=0.5),
    "multinomial": lambda y: y[torch.multinomial(torch.ones(64), 8)],
}


class Randomly(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.draw = nn.Linear(32, 32), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.draw(self.first(x).tanh()).exp().mean() + F.dropout(x, 0.5).mean()


@pytest.mark.parametrize("name", RANDOM)
def test_random_ops_draw_what_eager_draws(name: str) -> None:
    eager, ours = twins(lambda: Randomly(RANDOM[name]))
    at_minimum(ours, rows())
    for turn in range(2):
        assert_same_step(step_of(eager, rows(), seed=turn), step_of(ours, rows(), seed=turn))


# Recurrences.


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_an_lstm_whole_is_eagers_bit_for_bit_and_in_spans_of_time_up_to_rounding(batch_first: bool, bias: bool) -> None:
    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(16, 16, num_layers=2, dropout=0.0, batch_first=batch_first, bias=bias)

        def forward(self, x: Tensor) -> Any:
            return self.rnn(x)

    torch.manual_seed(1)
    model = States()
    x = rows(40 * 50, 16).reshape(40, 50, 16)
    y, (h, c) = model(x)  # with gradients: oneDNN's kernel for inference rounds otherwise
    whole = prepared(model, x)
    assert whole.finer is not None
    spans = 10 if batch_first else 8  # of ceil(0.7 sqrt(steps)) = 5 steps each, 50 or 40 of them
    # How many rows a matrix product has changes its rounding on some processors (AVX2 without AVX-512).
    for variant, layers, tolerance in ((whole, 2, 0.0), (whole.finer, 2 * spans, 1e-6)):
        found = [targets(kernel)[0] for kernel in variant.kernels.kernels if kernel.calls]
        assert found.count("training_rnn_layer") == layers
        run_by(model, variant.build(variant.planner.store_all()))
        ours, (ours_h, ours_c) = model(x)
        for mine, theirs in ((ours, y), (ours_h, h), (ours_c, c)):
            torch.testing.assert_close(mine, theirs, rtol=0.0, atol=tolerance)
        del model.forward


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_an_lstm_in_spans_of_time_drops_what_eager_drops(batch_first: bool, layers: int) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(16, 24, num_layers=layers, dropout=0.5 if layers > 1 else 0.0, batch_first=batch_first)
            self.out = nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Any:
            return F.dropout(self.out(self.rnn(x)[0]), 0.3)

    eager, ours = twins(Dropping)
    x = rows(40 * 50, 16).reshape(40, 50, 16)
    whole = prepared(ours, x)
    assert whole.finer is not None
    run_by(ours, whole.finer.build(whole.finer.planner.solve(whole.finer.planner.minimum())))
    expected, found = step_of(eager, x), step_of(ours, x)
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=0.0, atol=1e-6)
    assert found.outputs[0].stride() == expected.outputs[0].stride()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.generator, expected.generator)


def test_an_lstm_that_is_planned_whole_is_eagers_bit_for_bit() -> None:
    eager, ours = twins(LSTM)
    remat.wrap(ours, activation_budget="100%")
    x = rows(40 * 4, 16).reshape(40, 4, 16)
    for turn in range(2):
        assert_same_step(step_of(eager, x, seed=turn), step_of(ours, x, seed=turn))


def test_a_step_captured_again_is_the_same_step(quick_plans: None) -> None:
    """Torch's cache of fake results, warm from the first trace, must not show: plans are carried between processes."""
    model, inputs = nn.LSTM(8, 8), (torch.randn(40, 2, 8),)
    first, second = (prepare_example(model, inputs) for _ in range(2))
    for before, after in zip(first.variants(), second.variants(), strict=True):
        assert matching_variant(after, before.graph) is after
