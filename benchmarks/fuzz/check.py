"""Run a recipe eagerly and under a budget, and compare everything that a user can see, bit for bit."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

import rematerialize as remat
from benchmarks.fuzz.pieces import NOISES, RRELUS, STATEFUL, Fuzzed, mean_square
from benchmarks.fuzz.recipe import Arrival, Recipe
from rematerialize import torch_private as private
from rematerialize.api import choose
from rematerialize.budget import read_budget
from rematerialize.errors import CaptureError
from rematerialize.harness import weightless_loss
from rematerialize.ir import TrainingGraph
from rematerialize.plans import Plan
from rematerialize.prepare import PreparedStep, PrepareOptions, bind_inputs, byte_masks, prepare, shared_costs
from rematerialize.schedule import Schedule
from rematerialize.simulate import simulate
from rematerialize.solve import Planner

STEPS = 2
RATE = 0.05
MOST_SCRAMBLED = 5_000  # recomputations in the backward: all of them for each op would be gigabytes of fx graph
ROUNDING = 1e-5  # of the largest magnitude, where gradients meet in another order
Status = Literal["equal", "rounded", "refused", "invalid", "failed"]

# What may be refused, and by which words. Everything else that eager can do must work.
ALLOWED: dict[str, str] = {
    "a Python number is read from a tensor (BatchNorm with momentum=None)": "aten._local_scalar_dense",
    "checkpoint with use_reentrant=True": "When use_reentrant=True",
    # Of an output that the loss leaves out, or in a checkpointed region, where eager's gradient is silently wrong.
    "a saved value is changed in place where eager doesn't look": "has been modified by an inplace operation",
    "a view that overlaps itself is changed in place": "has internal overlap",
    "a view that as_strided made of a view is changed in place": "that as_strided made of another view",
    "an output of which eager can take no gradient, either": "is the output of a function that returns multiple views",
    "an input gets a gradient's history in place": "changes an input or a parameter that requires grad in place",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a recipe.

    "rounded": an output is an input or a view, so that autograd adds the gradients that meet there in another order
    than eager; all else must be equal. "invalid": eager itself can't do it (or nothing requires grad). "refused": an
    error of this package for a reason in `ALLOWED`. ``detail`` says why, in one line.
    """

    status: Status
    detail: str = ""
    recomputed: int = 0


@dataclass(slots=True)
class Seen:
    """All that some steps show, in order: (what, tensor or None)."""

    values: list[tuple[str, Tensor | None]] = field(default_factory=list)
    meeting: bool = False  # some output is an input or a view

    def note(self, name: str, value: Tensor | None) -> None:
        self.values.append((name, None if value is None else value.detach().clone()))


def check(recipe: Recipe) -> Outcome:
    """Compare two optimizer steps, and one step's measured peak with its budget."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _check(recipe)


def _check(recipe: Recipe) -> Outcome:
    torch.manual_seed(recipe.seed)
    eager = Fuzzed(recipe)
    ours = copy.deepcopy(eager)
    # Eager's checkpoint runs a region twice, buffer updates included (torch's issue 96136), and reads buffers that
    # were changed since: the step that is meant is the one without it.
    # The noise of a randomized leaky ReLU is saved before it is drawn, so that eager's checkpoint hands an empty one to
    # the backward.
    eager.plain_regions = any(
        piece.name in STATEFUL or (piece.name == "noise" and piece.k % NOISES in RRELUS) for piece in recipe.walk()
    )
    try:
        expected = _train(eager, recipe)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AssertionError) as error:
        return Outcome("invalid", _line(error))
    if not any(v is not None and name.startswith("gradient") for name, v in expected.values):
        return Outcome("invalid", "no gradients")
    try:
        plan = _plan(ours, recipe)
        remat.wrap(ours, plan=plan)
        found = _train(ours, recipe)
    except CaptureError as error:
        reason = next((reason for reason, words in ALLOWED.items() if words in str(error)), "")
        if reason:
            return Outcome("refused", reason)
        return Outcome("failed", f"refused: {_line(error)}")
    except Exception as error:
        return Outcome("failed", f"raised: {_line(error)}")
    apart = next(_differences(expected, found), "")
    if apart and (not expected.meeting or next(_differences(expected, found, ROUNDING), "")):
        return Outcome("failed", f"differs: {apart}")
    within = _check_peak(recipe, plan)
    return replace(within, status="rounded") if apart and within.status == "equal" else within


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def _inputs(recipe: Recipe, at: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(recipe.seed * 101 + at)
    drawn = [torch.randn(recipe.shape, generator=generator) for _ in range(2)]
    x, y = (_laid_out(recipe, values) for values in drawn)
    tokens = torch.randint(0, 7, recipe.shape[:-1], generator=generator)
    return (
        x.requires_grad_(bool(recipe.inputs_with_grad & 1)),
        y.requires_grad_(bool(recipe.inputs_with_grad & 2)),
        tokens,
    )


def _laid_out(recipe: Recipe, values: Tensor) -> Tensor:
    if recipe.turned and values.dim() != 4:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    return torch.empty(recipe.shape, memory_format=recipe.layout).copy_(values)


def _train(model: nn.Module, recipe: Recipe) -> Seen:
    seen = Seen()
    for step in range(STEPS):
        for micro in range(recipe.micro_batches):
            torch.manual_seed(recipe.seed + 10 * step + micro)
            inputs = _inputs(recipe, 10 * step + micro)
            outputs = model(*inputs)
            for index, output in enumerate(outputs):
                seen.note(f"output {index}", output)
                seen.meeting |= output._is_view() or any(output is value for value in inputs)
            _backward(outputs, recipe, seen)
            for name, value in zip(("x", "y"), inputs, strict=False):
                seen.note(f"input {name}", value)
                seen.note(f"gradient of {name}", value.grad)
            seen.note("generator", torch.get_rng_state())
        _note_model(model, seen)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=RATE)
                    parameter.grad = None
    return seen


def _backward(outputs: tuple[Tensor, ...], recipe: Recipe, seen: Seen) -> None:
    used = [out for i, out in enumerate(outputs) if (i == 0 or recipe.used >> i & 1) and out.requires_grad]
    if not used:
        raise ValueError("no output that the loss reads requires grad")
    losses = [out if out.dim() == 0 else _loss(out, recipe.arrival) for out in used]
    if recipe.loss != "each":
        losses = [torch.stack([loss.float() for loss in losses]).sum()]
    for index, loss in enumerate(losses):
        seen.note(f"loss {index}", loss)
        loss.backward(retain_graph=index < len(losses) - 1)


def _loss(output: Tensor, arrival: Arrival) -> Tensor:
    """A number whose gradient comes to the output in a layout."""
    if arrival == "expanded":
        return output.sum()
    if arrival == "output":
        return mean_square(output)
    turned = mean_square(output.permute(*reversed(range(output.dim()))).contiguous())
    return turned if arrival == "transposed" else turned + mean_square(output)


def _note_model(model: nn.Module, seen: Seen) -> None:
    for name, parameter in model.named_parameters():
        seen.note(f"gradient of {name}", parameter.grad)
        seen.note(f"parameter {name}", parameter)
    for name, buffer in model.named_buffers():
        seen.note(f"buffer {name}", buffer)


def _differences(expected: Seen, found: Seen, rounding: float = 0.0) -> Iterator[str]:
    for (name, left), (_, right) in zip(expected.values, found.values, strict=True):
        if left is None or right is None:
            if left is not right:
                yield f"{name} is {'absent' if right is None else 'there'}"
            continue
        if (left.dtype, left.shape, _strides(left)) != (right.dtype, right.shape, _strides(right)):
            yield f"{name} is {_layout(right)}, not {_layout(left)}"
        elif not torch.equal(_bits(left), _bits(right)):
            far = (left.double() - right.double()).abs().max().item()
            if left.is_floating_point() and far <= rounding * max(1.0, left.double().abs().max().item()):
                continue
            yield f"{name} by {far:.2g}"


def _strides(value: Tensor) -> tuple[int, ...]:
    """Of a dimension of one element, nothing."""
    return tuple(0 if size <= 1 else stride for stride, size in zip(value.stride(), value.shape, strict=True))


def _layout(value: Tensor) -> str:
    return f"{value.dtype} {tuple(value.shape)} {value.stride()}"


_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(value: Tensor) -> Tensor:
    """Bits, with one NaN for all."""
    if not value.is_floating_point():
        return value
    settled = torch.where(value.isnan(), torch.full_like(value, float("nan")), value).contiguous()
    return settled.view(_SAME_SIZE[value.element_size()])


# Planning.


def _plan(model: nn.Module, recipe: Recipe) -> Plan:
    """A plan by the recipe's solver, on costs by the recipe's seed: the same in every run."""
    torch.manual_seed(recipe.seed)
    inputs = bind_inputs(model.forward, _inputs(recipe, 0))
    # Without the variant whose LSTMs are split over time: it promises equality up to rounding only.
    prepared = replace(prepare(model, model.forward, inputs, PrepareOptions("store_all")), masked=None, finer=None)
    if recipe.seed % 2:  # the copy whose masks are bytes, be there any or not
        prepared = byte_masks(prepared, PrepareOptions("store_all"))
    if recipe.solver == "scramble":
        prepared = _with_costs(prepared, recipe.seed, "store_all")
        return _scrambled(model, prepared, recipe)
    prepared = _with_costs(prepared, recipe.seed, recipe.solver)
    low, high = prepared.minimum(), prepared.planner.store_all().peak_bytes
    return choose(model, prepared, read_budget(None, low + (high - low) * recipe.room // 100))


def _with_costs(prepared: PreparedStep, seed: int, solver: str) -> PreparedStep:
    graph = _costed(prepared.graph, seed)
    return replace(prepared, graph=graph, planner=Planner(graph, solver=solver))


def _costed(graph: TrainingGraph, seed: int) -> TrainingGraph:
    draw = random.Random(seed)
    return replace(graph, ops=tuple(replace(op, time_s=draw.choice((1e-6, 1e-5, 1e-4))) for op in graph.ops))


def _scrambled(model: nn.Module, prepared: PreparedStep, recipe: Recipe) -> Plan:
    """Store-all's schedule with recomputations at random: no solver would, but every one of them is valid."""
    plan = choose(model, prepared, read_budget(None, prepared.planner.store_all().peak_bytes))
    draw = random.Random(recipe.seed)
    share = (0.05, 0.3, 1.0)[recipe.seed % 3]
    names = {op.name for op in prepared.graph.ops if op.recomputable}
    ran: list[str] = []
    forward: list[str] = []
    for name in plan.schedule.forward:
        forward.append(name)
        ran += [name] if name in names else []
        if ran and draw.random() < share / 3:
            forward.append(draw.choice(ran))
    backward: list[str] = []
    once = set(ran)
    order = [op.name for op in prepared.graph.ops if op.name in once]
    share = min(share, MOST_SCRAMBLED / max(len(order) * len(plan.schedule.backward), 1))
    for name in plan.schedule.backward:
        chosen = [op for op in order if draw.random() < share]
        backward += chosen if recipe.room < 50 else draw.sample(chosen, len(chosen))
        backward.append(name)
    verdict = simulate(prepared.graph, forward, backward)
    schedule = replace(
        plan.schedule,
        forward=tuple(forward),
        backward=tuple(backward),
        peak_bytes=verdict.peak_bytes,
        time_s=verdict.time_s,
        budget_bytes=verdict.peak_bytes,
    )
    return replace(plan, schedule=schedule, budget_bytes=verdict.peak_bytes)


def quick_costs() -> Any:
    """Let this process's cost model run each kernel only once: the recipe decides what it costs."""
    shared_costs().time_limit_s = 0.0


# Memory.


def _check_peak(recipe: Recipe, plan: Plan) -> Outcome:
    """One step from clean gradients, the loss outside of it weightless: the allocator's peak against the budget."""
    given = plan.prepared
    assert given is not None
    schedule: Schedule = plan.schedule
    runs = len(schedule.forward) + len(schedule.backward)
    recomputed = runs - len({*schedule.forward, *schedule.backward})
    owner = given.model
    for parameter in owner.parameters():
        parameter.grad = None
    torch.manual_seed(recipe.seed)
    inputs = _inputs(recipe, 0)

    with private.allocation_events() as changes:
        outputs = owner(*inputs)
        # Gradients that meet at one output, or at the base of a view, are added up by autograd: no plan's business.
        distinct = [out for out in {id(out): out for out in outputs}.values() if out.requires_grad and out.grad_fn]
        plain = not any(out._is_view() for out in distinct)
        if distinct:
            weightless_loss(distinct).backward()
        del outputs, distinct
    measured = max(accumulate(changes()), default=0)
    if plain and measured > plan.budget_bytes:
        return Outcome("failed", f"peak {measured:,} of {plan.budget_bytes:,}", recomputed)
    return Outcome("equal", "", recomputed)
