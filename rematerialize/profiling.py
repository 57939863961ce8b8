"""Where a training step's memory and time go, before anything is rematerialized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rematerialize import torch_private as private
from rematerialize.budget import optimizer_bytes
from rematerialize.call_cost import call_seconds
from rematerialize.capture import FlatInputs
from rematerialize.plans import as_captured
from rematerialize.prepare import PreparedStep, Progress, bind_inputs, check_model, prepare_example
from rematerialize.report.modules import NO_LINE, WHOLE, LiveTensor, ModuleRow, module_rows, top_tensors
from rematerialize.report.notebook import profile_html
from rematerialize.report.sparkline import sparkline
from rematerialize.report.table import aligned_table, plan_table
from rematerialize.report.timeline import Timeline, kernel_title, of_schedule
from rematerialize.trial import settle, try_plans
from rematerialize.units import format_bytes, format_percent, format_seconds, parse_bytes

TOP = 10


@dataclass(frozen=True, slots=True)
class Measured:
    """A real step beside its prediction.

    Attributes
    ----------
    peak_bytes : int
        Of our step that stores everything: what the prediction is of.
    step_s : float
        Median time of that step.
    eager_peak_bytes, eager_step_s : int, float
        The same of the model as it is.
    """

    peak_bytes: int
    step_s: float
    eager_peak_bytes: int
    eager_step_s: float


@dataclass(frozen=True, slots=True)
class Profile:
    """A training step that stores everything, taken apart. ``print`` shows it.

    Attributes
    ----------
    timeline : Timeline
    resident : mapping of str to int
        Bytes that the step finds in memory: "parameters", "buffers", "inputs", "gradients" (existing ones),
        "optimizer state", "reserve".
    device : str
        What the costs are for.
    analytic : bool
        Whether they are computed rather than measured.
    capture_s, cost_s : float
        Seconds that tracing and cost measurement took.
    call_s : float
        Seconds that a call takes besides its kernels: checks, and what autograd does for parameters.
    measured : Measured, optional
    kinds : mapping of str to str
        The class of each module by its name.
    """

    timeline: Timeline
    resident: Mapping[str, int]
    device: str
    analytic: bool
    capture_s: float
    cost_s: float
    call_s: float = 0.0
    measured: Measured | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)

    @property
    def activation_peak_bytes(self) -> int:
        """Peak of what the step allocates, gradients included."""
        return self.timeline.peak_bytes

    @property
    def resident_bytes(self) -> int:
        """All that the step finds in memory, the optimizer's state and the reserve included."""
        return sum(self.resident.values())

    @property
    def peak_bytes(self) -> int:
        """Peak of everything that the step holds."""
        return self.activation_peak_bytes + self.resident_bytes

    @property
    def step_s(self) -> float:
        """Predicted time of a step."""
        return self.timeline.time_s + self.call_s

    def phase_s(self, phase: str) -> float:
        """Predicted time of the forward or the backward."""
        return sum(run.op.time_s for run in self.timeline.executions if run.phase == phase)

    def modules(self, depth: int | None = 2) -> tuple[ModuleRow, ...]:
        """What each module costs, modules told apart down to ``depth`` names."""
        return module_rows(self.timeline, depth=depth)

    def top_tensors(self, count: int = TOP) -> tuple[LiveTensor, ...]:
        """The largest tensors that are live at the peak."""
        return tuple(top_tensors(self.timeline, self.timeline.peak_position, count))

    def metrics(self) -> dict[str, float]:
        """Flat numbers for experiment trackers."""
        return {name: float(value) for name, value in self.figures().items()}

    def figures(self) -> dict[str, int | float]:
        """The same numbers, bytes and counts exact."""
        found: dict[str, int | float] = {
            "peak_bytes": self.peak_bytes,
            "activation_peak_bytes": self.activation_peak_bytes,
            "resident_bytes": self.resident_bytes,
            "step_s": self.step_s,
            "forward_s": self.phase_s("forward"),
            "backward_s": self.phase_s("backward"),
            "call_s": self.call_s,
            "ops": len(self.timeline.executions),
        }
        if self.measured is not None:
            found |= {f"measured_{name}": value for name, value in asdict(self.measured).items()}
        return found

    def to_dict(self, depth: int | None = 2, count: int = TOP) -> dict[str, Any]:
        """The profile as JSON-ready data."""
        return {
            "device": self.device,
            "analytic": self.analytic,
            "resident": dict(self.resident),
            **self.figures(),
            "peak": self._peak(),
            "top_tensors": [asdict(row) for row in self.top_tensors(count)],
            "modules": [asdict(row) for row in self.modules(depth)],
            "timeline": [run.live_bytes for run in self.timeline.executions],
            "boundary": self.timeline.boundary,
        }

    def _peak(self) -> dict[str, str]:
        if self.timeline.peak_position < 0:
            return {"op": "", "target": "", "phase": "", "module": "", "source": ""}
        run = self.timeline.executions[self.timeline.peak_position]
        return {
            "op": run.op.name,
            "target": run.op.target,
            "phase": run.phase,
            "module": run.op.module,
            "source": run.op.source,
        }

    def overview(self, size: Callable[[int], str] = format_bytes) -> list[tuple[str, str]]:
        """Names and values of the summary; ``size`` formats bytes."""
        peak = self._peak()
        rows = [(kind, size(amount)) for kind, amount in self.resident.items() if amount]
        rows += [
            ("activations and gradients at the peak", size(self.activation_peak_bytes)),
            ("peak", size(self.peak_bytes)),
            (f"reached in the {peak['phase']} at", f"{peak['source'] or NO_LINE}  {kernel_title(peak['target'])}"),
            ("in module", self._named(peak["module"])),
            ("forward, backward", ", ".join(format_seconds(self.phase_s(phase)) for phase in ("forward", "backward"))),
            *([("checks and autograd", format_seconds(self.call_s))] if self.call_s else []),
            ("costs", ("computed for " if self.analytic else "measured on ") + self.device),
        ]
        if self.measured is None:
            return [*rows, ("figures are of", "captured step; eager may need more")]
        return rows + self._beside(self.measured, size)

    def _title(self) -> str:
        """What it is of, by the model's class: a command line knows better, and has a title of its own."""
        return f"Training step of {kind}" if (kind := self.kinds.get("", "")) else "Training step"

    def _named(self, module: str) -> str:
        """A module for readers: a number alone, as a Sequential's parts have, says nothing."""
        kind = self.kinds.get(module, "")
        return f"{module} ({kind})" if module and kind else module or WHOLE

    def _beside(self, measured: Measured, size: Callable[[int], str]) -> list[tuple[str, str]]:
        def beside(predicted: float, real: float) -> str:
            return f"prediction {100 * (predicted / real - 1):+.1f}%" if real else "-"

        peak = beside(self.activation_peak_bytes, measured.peak_bytes)
        time = beside(self.step_s, measured.step_s)
        eager = beside(self.activation_peak_bytes, measured.eager_peak_bytes)
        return [
            ("measured activations", f"{size(measured.peak_bytes)} ({peak})"),
            ("measured step", f"{format_seconds(measured.step_s)} ({time})"),
            ("eager's activations", f"{size(measured.eager_peak_bytes)} ({eager})"),
            ("eager's step", format_seconds(measured.eager_step_s)),
        ]

    def tensor_rows(self, count: int = TOP, size: Callable[[int], str] = format_bytes) -> list[tuple[str, ...]]:
        """Rows of the table of tensors at the peak."""
        whole = max(self.activation_peak_bytes, 1)
        return [
            (
                size(row.size_bytes),
                format_percent(row.size_bytes / whole),
                row.label,
                row.module or WHOLE,
                row.source or NO_LINE,
            )
            for row in self.top_tensors(count)
        ]

    def module_table(self, depth: int | None = 2, size: Callable[[int], str] = format_bytes) -> list[tuple[str, ...]]:
        """Rows of the table of modules."""
        return [
            (
                row.title,
                format_seconds(row.forward_s),
                format_seconds(row.backward_s),
                size(row.stored_bytes),
                size(row.peak_bytes),
            )
            for row in self.modules(depth)
        ]

    def __str__(self) -> str:
        values = [run.live_bytes for run in self.timeline.executions]
        at = self.timeline.boundary * min(60, len(values)) // max(len(values), 1)
        return "\n\n".join(
            [
                plan_table(f"{self._title()}, everything stored", self.overview()),
                f"Memory over the step\n  {sparkline(values)}\n  {'forward':<{max(at, 8)}}backward",
                "Largest tensors at the peak\n" + aligned_table(TENSOR_HEADERS, self.tensor_rows(), TENSOR_SIDES),
                "Modules\n" + aligned_table(MODULE_HEADERS, self.module_table()),
            ]
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """What a notebook shows: the summary beside the memory over the step, the tables below."""
        tables = (
            ("Largest tensors at the peak", TENSOR_HEADERS, self.tensor_rows(), TENSOR_SIDES),
            ("Modules", MODULE_HEADERS, self.module_table(), MODULE_SIDES),
        )
        return profile_html(f"{self._title()}, everything stored", self.overview(), self.timeline, tables)


TENSOR_HEADERS = ("size", "share", "tensor", "module", "made at")
TENSOR_SIDES = ">><<<"  # to which their columns are aligned
MODULE_HEADERS = ("module", "forward", "backward", "stored", "at the peak")
MODULE_SIDES = "<>>>>"


def profile(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    *,
    optimizer: Any = None,
    reserve: int | str = 0,
    device: str | None = None,
    measure: bool = False,
    cost_cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Find where the memory of one training step goes.

    Parameters
    ----------
    model : nn.Module
        In training mode.
    example_inputs : tuple or dict
        Positional arguments, or keyword arguments, of one forward call.
    optimizer : torch.optim.Optimizer or str, optional
        Count its state; a name such as "adamw" means its default options.
    reserve : int or str
        Bytes to add for what the pass can't see.
    device : str, optional
        As in ``plan``: a device of the table means that nothing is run.
    measure : bool
        Also run the step, as it is and captured, and report its real peak and time. It runs from the model's
        present state, buffers and generators are put back.
    cost_cache, progress
        As in ``plan``.

    Raises
    ------
    CaptureError, UnitError, RematerializeError
        As ``plan``.
    """
    state_bytes = optimizer_bytes(optimizer, check_model(model))
    reserve_bytes = parse_bytes(reserve, name="reserve") if reserve else 0
    if measure:
        settle(model, example_inputs)
    prepared = prepare_example(model, example_inputs, device=device, cost_cache=cost_cache, progress=progress)
    inputs = bind_inputs(model.forward, example_inputs)
    resident = _resident(prepared, inputs)
    resident |= {"optimizer state": state_bytes, "reserve": reserve_bytes}
    found = Profile(
        timeline=of_schedule(prepared.graph, prepared.planner.store_all()),
        resident=resident,
        device=prepared.device_name,
        analytic=prepared.analytic,
        capture_s=prepared.capture_s,
        cost_s=prepared.cost_s,
        call_s=call_seconds(prepared, model, inputs),
        kinds={name: type(module).__name__ for name, module in model.named_modules()},
    )
    if not measure:
        return found
    if progress is not None:
        progress("measure", 0, 1)
    eager, (ours,) = try_plans(model, example_inputs, [as_captured(prepared)])
    return replace(found, measured=Measured(ours.peak_bytes, ours.step_s, eager.peak_bytes, eager.step_s))


def _resident(prepared: PreparedStep, inputs: FlatInputs) -> dict[str, int]:
    """Bytes by kind; a storage that two kinds share counts for the first."""
    tensors: dict[str, list[Tensor]] = {"parameters": [], "buffers": [], "inputs": list(inputs.tensors)}
    for slot in prepared.captured.slots:
        tensors["parameters" if slot.kind == "parameter" else "buffers"].append(slot.read())
    leaves = [tensor for group in tensors.values() for tensor in group if tensor.is_leaf]
    tensors["gradients"] = [leaf.grad for leaf in leaves if leaf.grad is not None]
    seen: set[int] = set()
    found: dict[str, int] = {}
    for kind, group in tensors.items():
        storages = {private.storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in group}
        found[kind] = sum(size for key, size in storages.items() if key not in seen)
        seen.update(storages)
    return found
