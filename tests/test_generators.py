"""Random generators: a step draws from the one that eager draws from, and seeding inside a forward is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rematerialize as remat
from rematerialize.prepare import bind_inputs, prepare
from rematerialize.simulate import simulate
from tests.twins import SEED, assert_same_step, at_minimum, plans_of, run_by, step_of, store_all

pytestmark = pytest.mark.usefixtures("quick_plans")

OUTSIDE = torch.Generator()


class Noisy(nn.Module):
    """Noise and masks, from a generator of its own and from the default one, in turn."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.generator: torch.Generator | list[torch.Generator] = torch.Generator().manual_seed(3)

    def noise(self, x: Tensor) -> Tensor:
        own = self.generator
        assert isinstance(own, torch.Generator)
        mask = torch.empty_like(x.T).bernoulli_(0.7, generator=own).T  # not contiguous
        chosen = torch.randperm(len(x), generator=own)
        return mask * torch.randn(x.shape, generator=own) + torch.rand(x.shape) + x[chosen]

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = torch.nn.functional.dropout((layer(x) + self.noise(x)).tanh(), 0.2).sin()
        return x


def pair(kind: Callable[[], nn.Module] = Noisy) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    eager, ours = kind(), kind()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def rows() -> Tensor:
    return torch.linspace(-2, 2, 32 * 64).sin().reshape(32, 64)


def state(model: nn.Module) -> Tensor:
    own = vars(model)["generator"]
    assert isinstance(own, torch.Generator)
    return own.get_state()


def test_a_generator_of_ones_own_is_drawn_from_and_left_as_eager_leaves_it() -> None:
    eager, ours = pair()
    before = state(ours)
    ours = at_minimum(ours, rows())
    assert torch.equal(state(ours), before), "planning drew from it"
    for turn in range(3):
        assert_same_step(step_of(eager, rows(), seed=SEED + turn), step_of(ours, rows(), seed=SEED + turn))
        assert torch.equal(state(eager), state(ours))


def test_recomputing_every_draw_gives_the_same_numbers() -> None:
    eager, ours = pair()
    prepared = prepare(ours, ours.forward, bind_inputs(ours.forward, (rows(),)))
    order = prepared.planner.store_all()
    again = tuple(op.name for op in prepared.graph.ops if op.phase == "forward" and op.recomputable)
    schedule = replace(order, backward=(*again, *order.backward))
    simulate(prepared.graph, schedule.forward, schedule.backward)
    ours = run_by(ours, prepared.build(schedule))
    for turn in range(2):
        assert_same_step(step_of(eager, rows(), seed=SEED + turn), step_of(ours, rows(), seed=SEED + turn))
        assert torch.equal(state(eager), state(ours))


def test_another_generator_is_another_plan() -> None:
    eager, ours = pair()
    store_all(ours)
    assert_same_step(step_of(eager, rows()), step_of(ours, rows()))
    for model in (eager, ours):
        model.generator = torch.Generator().manual_seed(8)
    assert_same_step(step_of(eager, rows()), step_of(ours, rows()))
    assert torch.equal(state(eager), state(ours))
    assert len(plans_of(ours)) == 2


class Passed(Noisy):
    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.second(self.first(x).tanh() + torch.rand(x.shape, generator=generator)).tanh()


@pytest.mark.parametrize("which", ["own", "default", "none"])
def test_a_generator_may_be_an_argument(which: str) -> None:
    eager, ours = pair(Passed)
    store_all(ours)
    for turn in range(3):
        passed = [
            {"own": torch.Generator().manual_seed(turn), "default": torch.default_generator, "none": None}[which]
            for _ in range(2)
        ]
        assert_same_step(step_of(eager, rows(), passed[0]), step_of(ours, rows(), passed[1]))
        if which == "own":
            assert torch.equal(passed[0].get_state(), passed[1].get_state())


class InList(Noisy):
    def __init__(self) -> None:
        super().__init__()
        self.generator = [torch.Generator()]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * torch.rand(x.shape, generator=self.generator[0]))


class Global(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * torch.rand(x.shape, generator=OUTSIDE))


@pytest.mark.parametrize("kind", [InList, Global])
def test_a_generator_that_could_be_exchanged_unseen_is_refused(kind: Callable[[], nn.Module]) -> None:
    _, ours = pair(kind)
    store_all(ours)
    with pytest.raises(remat.CaptureError, match=r"torch.Generator at test_generators.py:\d+ .*\(self.generator = "):
        ours(rows())


class Seeds(Noisy):
    def seed(self) -> None:
        torch.manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        self.seed()
        return self.second(self.first(x) * torch.rand(x.shape))


class SetsState(Seeds):
    def seed(self) -> None:
        torch.set_rng_state(torch.get_rng_state())


class Forks(Seeds):
    def seed(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.rand(2)


class SeedsDirectly(Seeds):
    def seed(self) -> None:
        torch.default_generator.manual_seed(3)


class SeedsItsOwn(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        own = self.generator
        assert isinstance(own, torch.Generator)
        own.manual_seed(3)  # the state that it has already
        return self.second(self.first(x) * torch.rand(x.shape, generator=own))


@pytest.mark.parametrize("kind", [Seeds, SetsState, Forks, SeedsDirectly, SeedsItsOwn])
def test_a_forward_that_sets_a_generators_state_is_refused_and_every_state_is_kept(
    kind: Callable[[], nn.Module],
) -> None:
    _, ours = pair(kind)
    store_all(ours)
    before = torch.get_rng_state(), state(ours)
    named = r" at test_generators.py:\d+" if kind in (Seeds, SetsState, Forks) else ""
    with pytest.raises(remat.CaptureError, match=f"sets the state of a random generator{named} "):
        ours(rows())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(state(ours), before[1])


INSIDE, SEEDED = threading.Event(), threading.Event()


class Meets(nn.Linear):
    """Its first trace waits until another thread has set the seed."""

    def forward(self, x: Tensor) -> Tensor:
        INSIDE.set()
        assert SEEDED.wait(60)
        return super().forward(x).tanh()


def test_another_thread_may_set_the_seed_while_a_step_is_planned() -> None:
    over = threading.Event()

    def seed() -> None:
        INSIDE.wait()
        torch.manual_seed(5)
        SEEDED.set()
        over.wait()

    other = threading.Thread(target=seed)
    other.start()
    try:
        model = remat.wrap(Meets(8, 8), activation_budget="100%")
        model(torch.ones(2, 8)).sum().backward()
    finally:
        INSIDE.set()
        over.set()
        other.join()
    assert model.weight.grad is not None


IN_PLACE: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {
    "exponential_": lambda t, g: t.exponential_(2.0, generator=g),
    "log_normal_": lambda t, g: t.log_normal_(0.5, 0.2, generator=g),
    "cauchy_": lambda t, g: t.cauchy_(generator=g),
    "geometric_": lambda t, g: t.geometric_(0.5, generator=g),
    "random_ from zero": lambda t, g: t.random_(0, 5, generator=g),
    "random_": lambda t, g: t.random_(5, generator=g),
    "normal_": lambda t, g: t.normal_(generator=g),
    "uniform_": lambda t, g: t.uniform_(0.5, 1.5, generator=g),
    "bernoulli_": lambda t, g: t.bernoulli_(0.3, generator=g),
}


class FillsByHand(Noisy):
    def __init__(self, fill: Callable[[Tensor, torch.Generator | None], Tensor], *, own: bool) -> None:
        super().__init__()
        self.fill, self.own = fill, own

    def noise(self, x: Tensor) -> Tensor:
        assert isinstance(self.generator, torch.Generator)
        return x + self.fill(torch.empty_like(x), self.generator if self.own else None) + torch.rand(x.shape)


@pytest.mark.parametrize("own", [True, False], ids=["own generator", "default generator"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_drawn_in_place_is_what_eager_draws(name: str, own: bool) -> None:
    eager, ours = pair(lambda: FillsByHand(IN_PLACE[name], own=own))
    at_minimum(ours, rows())
    for _ in range(2):
        assert_same_step(step_of(eager, rows()), step_of(ours, rows()))
        assert torch.equal(state(eager), state(ours))


def test_a_lower_bound_that_torch_can_not_trace_is_refused_with_the_way_round() -> None:
    model = FillsByHand(lambda t, g: t.random_(3, 5, generator=g), own=True)
    with pytest.raises(remat.CaptureError, match=r"random_ with a lower bound other than 0.*add the bound"):
        store_all(model)(rows())
