"""A plan: the schedule chosen for a step under a budget, what it costs, and its file."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rematerialize.errors import BudgetError, GraphError, RematerializeError, ScheduleError
from rematerialize.ir import TrainingGraph
from rematerialize.plan_file import FORMAT, check_said, digest, read_numbers, read_plan
from rematerialize.report.explain import Explanation, explain
from rematerialize.report.notebook import plan_html
from rematerialize.report.origin import Origin
from rematerialize.report.plot import memory_figure, save_figure
from rematerialize.report.table import plan_table
from rematerialize.report.timeline import Timeline, of_schedule, store_all
from rematerialize.schedule import Schedule
from rematerialize.simulate import simulate
from rematerialize.units import format_bytes, format_percent, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rematerialize.prepare import PreparedStep

_APART = 16  # the graph may be of another way to run the step, with other sizes; none is this far from the plain one
_TITLE = "Training step under an activation budget"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to store and what to recompute, and what that costs.

    All bytes are in the activation scope: what a step allocates above what was resident when it began,
    gradients included.

    Attributes
    ----------
    graph : TrainingGraph
        The step that was planned.
    schedule : Schedule
        What to run.
    budget_bytes : int
        The budget, exact.
    store_all_peak_bytes : int
        Peak of the step when nothing is recomputed.
    store_all_time_s : float
        Predicted time of that step.
    searched_minimum_bytes : int or None
        The smallest budget that works, where it was searched for; `minimum_bytes` always knows it.
    resident_bytes : int
        What the step finds in memory: parameters, buffers, inputs, existing gradients.
    plan_s : float
        Seconds that the search took, capture and cost measurement excluded.
    origin : Origin
        What it was made for, for readers.
    """

    graph: TrainingGraph
    schedule: Schedule
    budget_bytes: int
    store_all_peak_bytes: int
    store_all_time_s: float
    searched_minimum_bytes: int | None = field(repr=False)
    resident_bytes: int
    plan_s: float = 0.0
    prepared: PreparedStep | None = field(default=None, repr=False, compare=False)
    origin: Origin = field(default=Origin(), repr=False, compare=False)

    @property
    def minimum_bytes(self) -> int:
        """The smallest budget that works; searched for when it is first asked, where `wrap` didn't need it."""
        if self.searched_minimum_bytes is not None:
            return self.searched_minimum_bytes
        return self.store_all_peak_bytes if self.prepared is None else self.prepared.minimum()

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the planned step."""
        return self.schedule.peak_bytes

    @property
    def besides_bytes(self) -> int:
        """What the budget that was asked for holds besides `budget_bytes`: 0 if it was an activation budget."""
        return self.resident_bytes + self.origin.reserve_bytes if self.origin.whole else 0

    @property
    def overhead(self) -> float:
        """Predicted makespan / store-all makespan - 1."""
        return self.schedule.time_s / self.store_all_time_s - 1 if self.store_all_time_s else 0.0

    @property
    def gap(self) -> float | None:
        """How far the makespan is at most above that of any schedule within the budget; None if nothing is proven."""
        gap = self.schedule.gap
        return None if gap is None or gap == float("inf") else gap

    @property
    def recomputed(self) -> int:
        """Executions beyond the first of each op."""
        runs = Counter((*self.schedule.forward, *self.schedule.backward))
        return sum(count - 1 for count in runs.values())

    def stored_timeline(self) -> Timeline:
        """The step that stores everything, as reports draw it beside the plan: to this plan's figures of it."""
        return store_all(self.graph, time_s=self.store_all_time_s, peak_bytes=self.store_all_peak_bytes)

    def _rows(self) -> list[tuple[str, str]]:
        stored = self.store_all_peak_bytes
        return [
            ("activation budget" if self.origin.whole else "budget", format_bytes(self.budget_bytes)),
            ("peak", f"{format_bytes(self.peak_bytes)} ({format_percent(self.peak_bytes / max(stored, 1))})"),
            ("store-all peak", format_bytes(stored)),
            ("smallest budget", format_bytes(self.minimum_bytes)),
            ("resident besides", format_bytes(self.resident_bytes)),
            ("overhead", format_percent(self.overhead)),
            ("gap to lower bound", "unknown" if self.gap is None else format_percent(self.gap)),
            ("recomputed ops", f"{self.recomputed} of {len(self.graph.ops)}"),
            ("solver", self.schedule.solver),
            ("planned in", format_seconds(self.plan_s)),
        ]

    def __str__(self) -> str:
        return plan_table(_TITLE, self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """What a notebook shows: what it was made for, the table beside the memory over the step."""
        plan, stored = of_schedule(self.graph, self.schedule), self.stored_timeline()
        title = f"Memory plan of {self.origin.target}" if self.origin.target else _TITLE
        about = self.origin.line()
        return plan_html(title, self._rows(), plan, stored, budget_bytes=self.budget_bytes, about=about)

    def explain(self, depth: int = 2) -> Explanation:
        """Per module and op: what is stored, what is recomputed how often, and why.

        Parameters
        ----------
        depth : int
            How many names of a module's path tell modules apart in the table.
        """
        return explain(of_schedule(self.graph, self.schedule), depth)

    def metrics(self) -> dict[str, float]:
        """Flat numbers for experiment trackers: MLflow, TensorBoard, Weights & Biases."""
        return {name: float(value) for name, value in self.figures().items()}

    def figures(self) -> dict[str, int | float]:
        """The same numbers, bytes and counts exact."""
        found: dict[str, int | float] = {
            "budget_bytes": self.budget_bytes,
            "peak_bytes": self.peak_bytes,
            "store_all_peak_bytes": self.store_all_peak_bytes,
            "minimum_bytes": self.minimum_bytes,
            "resident_bytes": self.resident_bytes,
            "step_s": self.schedule.time_s,
            "store_all_step_s": self.store_all_time_s,
            "overhead": self.overhead,
            "recomputed_ops": self.recomputed,
            "ops": len(self.graph.ops),
            "plan_s": self.plan_s,
        }
        if self.gap is not None:
            found["gap"] = self.gap
        return found

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw memory over the step: the plan, store-all, the budget, where the backward begins.

        Parameters
        ----------
        path : str or Path, optional
            Also write the figure there, as PNG, SVG or PDF by its suffix.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        RematerializeError
            If matplotlib, the extra ``plot``, isn't installed, or the suffix is another one.
        """
        figure = memory_figure(
            of_schedule(self.graph, self.schedule),
            self.stored_timeline(),
            budget_bytes=self.budget_bytes,
            title=self.origin.title("Memory plan"),
        )
        if path is not None:
            save_figure(figure, path)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data, graph and schedule included."""
        data = {
            "format": FORMAT,
            "made_for": self.origin.to_dict(),
            "budget_bytes": self.budget_bytes,
            "peak_bytes": self.peak_bytes,
            "store_all_peak_bytes": self.store_all_peak_bytes,
            "store_all_time_s": self.store_all_time_s,
            "minimum_bytes": self.minimum_bytes,
            "resident_bytes": self.resident_bytes,
            "overhead": self.overhead,
            "gap": self.gap,
            "plan_s": self.plan_s,
            "graph": json.loads(self.graph.to_json()),
            "schedule": json.loads(self.schedule.to_json()),
        }
        return {**data, "digest": digest(data)}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Raises
        ------
        RematerializeError
            If the file can't be written.
        """
        try:
            Path(path).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")
        except OSError as error:
            raise RematerializeError(f"can't write the plan {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan and check it: its graph is verified, its schedule replayed by the simulator.

        Figures that no replay gives, such as `resident_bytes`, are held by the file's digest. A file of before digests
        is read with an `UncheckedPlanWarning`.

        Raises
        ------
        ScheduleError, GraphError
            If there is no such file, it isn't a plan, its figures don't go together or were changed since it was
            saved, or it holds a schedule that its graph doesn't allow. One line each.
        """
        data = read_plan(path)
        try:
            graph = TrainingGraph.from_json(data["graph"])
            schedule = Schedule.from_json(data["schedule"])
            result = simulate(graph, schedule.forward, schedule.backward)
        except (GraphError, ScheduleError) as error:
            raise type(error)(f"{path} is not a good plan: {error}") from None
        numbers = read_numbers(path, data)
        if result.peak_bytes != schedule.peak_bytes or result.peak_bytes > numbers["budget_bytes"]:
            raise ScheduleError(
                f"{path}: its schedule needs {result.peak_bytes} bytes by replay, the file says "
                f"{schedule.peak_bytes} under a budget of {numbers['budget_bytes']}; make a new plan"
            )
        # What the schedule needs is enough: a file that asks for more as its smallest budget is wrong.
        numbers["searched_minimum_bytes"] = min(numbers.pop("minimum_bytes"), result.peak_bytes)
        try:
            origin = Origin.from_dict(data.get("made_for", {}))
        except ValueError as error:
            raise ScheduleError(f"{path}: {error}; make a new plan") from None
        made = cls(graph=graph, schedule=schedule, origin=origin, **numbers)
        own, said = store_all(graph).peak_bytes, made.store_all_peak_bytes
        if own > _APART * said or said > _APART * own:
            raise ScheduleError(
                f"{path}: store_all_peak_bytes is {said}, storing everything takes {own} bytes by replay; make a new "
                "plan"
            )
        check_said(path, data, {"peak_bytes": made.peak_bytes, "overhead": made.overhead, "gap": made.gap})
        return made


@dataclass(frozen=True, slots=True)
class Scope:
    """What a budget is of: its name in messages, what the user gave, and the whole of which that may be a share."""

    name: str
    given: str
    whole_bytes: int
    whole: str


def below_minimum(asked: int, minimum: int, scope: Scope) -> BudgetError:
    """The planner's refusal, in the scope in which the user gave the budget."""
    share, least = "", ""
    if scope.given.endswith("%"):
        share = f" ({scope.given} of {scope.whole})"
        least = f", {format_percent(minimum / max(scope.whole_bytes, 1))} of {scope.whole}"
    return BudgetError(
        f"no plan fits {scope.name} of {asked} bytes{share}: the smallest that works is {minimum} bytes "
        f"({format_bytes(minimum)}{least}); raise the budget or make the batch smaller",
        minimum_bytes=minimum,
    )


def as_captured(prepared: PreparedStep) -> Plan:
    """The plan that runs what was captured, in its order: a planner's would reorder it for a lower peak."""
    schedule = prepared.planner.store_all()
    return Plan(
        graph=prepared.graph,
        schedule=schedule,
        budget_bytes=schedule.peak_bytes,
        store_all_peak_bytes=schedule.peak_bytes,
        store_all_time_s=schedule.time_s,
        searched_minimum_bytes=schedule.peak_bytes,
        resident_bytes=prepared.resident_bytes,
        plan_s=0.0,
        prepared=prepared,
    )
