"""Data parallelism over two processes: around a wrapped model and around wrapped parts as in eager, else refused."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import rematerialize as remat
from tests.twins import at_minimum

WORLD, STEPS, WIDTH = 2, 3, 32
_PATIENCE_S = 180  # far above what the processes need: it is there to turn a hang into a failure


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.counted = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(self.counted(self.down(nn.functional.gelu(self.up(self.norm(x))))), 0.1)


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), Block(), nn.Linear(WIDTH, 4))


def batch(seed: int) -> Tensor:
    return torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(seed))


def replicated(wrapped: bool) -> nn.Module:
    model = made()
    return DistributedDataParallel(at_minimum(model, batch(0)) if wrapped else model)


def sharded(wrapped: bool) -> nn.Module:
    model = made()
    mesh = distributed.init_device_mesh("cpu", (WORLD,))
    for part in (model[1], model[2]):
        fully_shard(at_minimum(part, batch(0).requires_grad_()) if wrapped else part, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def trained(model: nn.Module, rank: int) -> list[Tensor]:
    """Losses, parameters and buffers after some steps, every second batch accumulated without synchronizing."""
    found = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        for micro in range(2):
            alone = isinstance(model, DistributedDataParallel) and micro == 0
            torch.manual_seed(1000 * rank + 10 * step + micro)
            with model.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
                loss = model(batch(100 * rank + 10 * step + micro)).square().mean()
                loss.backward()
            found.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    state = [value.detach() for value in (*model.parameters(), *model.buffers())]
    return found + [value.full_tensor() if hasattr(value, "full_tensor") else value for value in state]


def work(make: Callable[[bool], nn.Module], rank: int, where: str, answers: Any) -> None:
    """In a child: train eager's twin and ours in the same group, and tell how many values there are and differ."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=WORLD)
    try:
        eager, ours = (trained(make(wrapped), rank) for wrapped in (False, True))
        answers.put((len(eager), sum(not torch.equal(a, b) for a, b in zip(eager, ours, strict=True))))
    except BaseException as error:
        answers.put(repr(error))
        raise
    finally:
        distributed.destroy_process_group()


def assert_trains_as_eager(make: Callable[[bool], nn.Module], where: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    children = [
        context.Process(target=work, args=(make, rank, str(where / "group"), answers), daemon=True)
        for rank in range(WORLD)
    ]
    for child in children:
        child.start()
    try:
        count = 2 * STEPS + len([*made().parameters(), *made().buffers()])
        assert [answers.get(timeout=_PATIENCE_S) for _ in children] == [(count, 0)] * WORLD
        for child in children:
            child.join(_PATIENCE_S)
    finally:
        for child in children:
            child.kill()


def test_a_wrapped_model_is_trained_by_data_parallelism_as_eager_is(tmp_path: Path) -> None:
    assert_trains_as_eager(replicated, tmp_path)


def test_wrapped_parts_that_are_sharded_train_as_eager_does(tmp_path: Path) -> None:
    assert_trains_as_eager(sharded, tmp_path)


@pytest.fixture
def group(tmp_path: Path) -> Any:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


DRIVEN: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "DistributedDataParallel": (
        DistributedDataParallel,
        r"this model is driven by DistributedDataParallel: wrap what it holds",
    ),
    "a part": (lambda model: nn.Sequential(DistributedDataParallel(model)), r"the model's part '0' is driven"),
    "DataParallel": (nn.DataParallel, r"copied by DataParallel.*use DistributedDataParallel"),
    "FullyShardedDataParallel": (
        lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        r"sharded by FullyShardedDataParallel.*use fully_shard",
    ),
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", DRIVEN)
def test_what_data_parallelism_drives_is_refused_with_the_way_round(name: str) -> None:
    drive, said = DRIVEN[name]
    model = drive(made())
    with pytest.raises(remat.RematerializeError, match=said):
        remat.wrap(model, activation_budget="90%")
    with pytest.raises(remat.RematerializeError, match=said):
        remat.plan(model, (batch(0),), activation_budget="90%")


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("sharded_first", [True, False])
def test_a_whole_of_sharded_parts_is_refused_with_the_way_round(sharded_first: bool) -> None:
    model = made()
    if not sharded_first:
        remat.wrap(model, activation_budget="90%")
    fully_shard(model[1], mesh=distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(remat.RematerializeError, match=r"part '1' is sharded by fully_shard.*wrap the parts"):
        remat.wrap(model, activation_budget="90%") if sharded_first else model(batch(0))
