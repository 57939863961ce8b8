"""The life of a process: saving and loading, workers that are forked or spawned, training in a child process."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as collectives
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, TensorDataset

import rematerialize as remat
from tests.twins import assert_same_step, at_minimum, gradients_of, same, step_of, twins

pytestmark = pytest.mark.usefixtures("quick_plans")
_PATIENCE_S = 120  # two orders above what a child needs: it is there to turn a hang into a failure


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.dropout(self.norm(self.first(x)).tanh(), 0.2)).tanh()


def batch(rows: int = 8) -> Tensor:
    return torch.linspace(-2, 2, rows * 16).reshape(rows, 16).sin()


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_wrapped_model_trains_as_the_original(name: str) -> None:
    eager, ours = twins(Net)
    ours = remat.wrap(ours, activation_budget="95%", example_inputs=(batch(),))
    assert_same_step(step_of(eager, batch(), seed=1), step_of(ours, batch(), seed=1))
    for model in (eager, ours):
        model.zero_grad()
    twin = COPIES[name](ours)
    assert_same_step(step_of(eager, batch(), seed=2), step_of(twin, batch(), seed=2))
    assert gradients_of(ours)["first.weight"] is None
    assert type(remat.unwrap(twin)) is Net


def test_distributed_checkpoints_go_from_a_wrapped_model_to_an_unwrapped_one_and_back(tmp_path: Path) -> None:
    eager, ours = twins(Net)
    ours = at_minimum(ours, batch())
    step_of(ours, batch())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.25)
    for source, target in ((ours, eager), (eager, ours)):
        folder = tmp_path / type(source).__name__ / str(id(source))
        dcp.save({"model": source.state_dict()}, checkpoint_id=folder)
        for tensor in target.state_dict().values():
            tensor.zero_() if source is eager else None
        held = {"model": target.state_dict()}
        dcp.load(held, checkpoint_id=folder)
        target.load_state_dict(held["model"])
        assert source.state_dict().keys() == target.state_dict().keys()
    for model in (eager, ours):
        model.zero_grad()
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_run_beside_a_wrapped_model(method: str) -> None:
    eager, ours = twins(Net)
    ours = at_minimum(ours, batch())
    data = TensorDataset(batch(32))
    loaders = (DataLoader(data, 8), DataLoader(data, 8, num_workers=2, multiprocessing_context=method))
    for turn, ((expected,), (got,)) in enumerate(zip(*loaders, strict=True)):
        assert_same_step(step_of(eager, expected, seed=turn), step_of(ours, got, seed=turn))


def _train(model: nn.Module, x: Tensor, answers: Any) -> None:
    """In the child: a step by the plan that came along (or a new one), then one that must be planned here."""
    torch.set_num_threads(1)
    found = []
    for rows in (len(x), len(x) // 2):
        model.zero_grad()
        step = step_of(model, x[:rows])
        found.append([t.numpy() for t in (*step.outputs, *(g for g in step.gradients.values() if g is not None))])
    answers.put(found)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_trains_and_plans_after_its_parent_planned(method: str) -> None:
    eager, ours = twins(Net)
    ours = remat.wrap(ours, activation_budget="95%")
    start = copy.deepcopy(ours.state_dict())
    step_of(ours, batch())
    ours.load_state_dict(start)
    ours.zero_grad()
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=_train, args=(ours, batch(), answers), daemon=True)
    child.start()
    try:
        found = answers.get(timeout=_PATIENCE_S)
        child.join(_PATIENCE_S)
        assert child.exitcode == 0
    finally:
        child.kill()
    for rows, tensors in zip((8, 4), found, strict=True):
        eager.zero_grad()
        step = step_of(eager, batch()[:rows])
        expected = [*step.outputs, *(g for g in step.gradients.values() if g is not None)]
        assert all(same(a, torch.from_numpy(b)) for a, b in zip(expected, tensors, strict=True))


class Gathers(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * collectives.all_reduce(hidden.detach(), "sum", distributed.group.WORLD))


def test_a_collective_inside_of_a_step_is_refused(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        ours = remat.wrap(Gathers(), activation_budget="100%")
        with pytest.raises(remat.CaptureError, match="talks to other processes"):
            ours(batch())
    finally:
        distributed.destroy_process_group()
