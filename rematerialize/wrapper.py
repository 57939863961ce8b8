"""The forward of a wrapped model: plans per input signature, runs the planned step or the original forward."""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import nn

from rematerialize import torch_private as private
from rematerialize.capture import FlatInputs, flatten_inputs
from rematerialize.capture.past import without_past
from rematerialize.errors import RematerializeError
from rematerialize.plans import Plan
from rematerialize.python_state import PythonState, changed
from rematerialize.runtime import TrainingStep, check_surroundings
from rematerialize.signature import signature
from rematerialize.units import format_bytes, format_percent

_log = logging.getLogger("rematerialize")


_Key = tuple[tuple[Hashable, PythonState], int]
# With the modules: the keys name them by id, which nobody else may take while the key stands.
_Entry = tuple[Plan, TrainingStep, tuple[nn.Module, ...]]


class PlanSignature(Protocol):
    """Makes the plan and the step for one input signature."""

    def held_bytes(self, model: nn.Module, inputs: FlatInputs) -> int:
        """Bytes of gradients in memory that the plan must leave room for: they are part of the signature."""

    def __call__(
        self, model: nn.Module, forward: Callable[..., Any], inputs: FlatInputs
    ) -> tuple[Plan, TrainingStep]: ...


class RematerializedForward:
    """Stands in a model's ``__dict__`` under "forward", before the class's own.

    Parameters
    ----------
    model : nn.Module
    plan_signature : PlanSignature
    max_plans : int
        How many signatures to keep.
    """

    is_rematerialized = True

    def __init__(self, model: nn.Module, plan_signature: PlanSignature, *, max_plans: int) -> None:
        self.model = model
        self.had_own = "forward" in vars(model)
        self.own_forward = vars(model).get("forward")
        self.plan_signature = plan_signature
        self.max_plans = max_plans
        # Several plans for one signature where the forward's Python asks something of the inputs.
        self._steps: OrderedDict[_Key, list[_Entry]] = OrderedDict()
        self._lock = threading.RLock()
        self._changes = 0  # plans made again for a value of Python that changed
        functools.update_wrapper(self, type(model).forward, updated=())

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def original(self) -> Callable[..., Any]:
        """The forward that this one stands for."""
        if self.had_own:
            assert self.own_forward is not None
            return self.own_forward  # type: ignore[no-any-return]
        bound: Callable[..., Any] = type(self.model).forward.__get__(self.model)
        return bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.model:  # bound as a method, as accelerate does when it takes its own away
            args = args[1:]
        if not (self.model.training and torch.is_grad_enabled()):
            return self.original(*args, **kwargs)
        return self.run_planned(args, kwargs)

    @private.outside_of_dynamo
    def run_planned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output, by the step that is planned for such inputs; plans it if there is none."""
        inputs = flatten_inputs(args, without_past(self.original, args, kwargs))
        if not any(tensor.requires_grad for tensor in itertools.chain(self.model.parameters(), inputs.tensors)):
            return self.original(*args, **kwargs)  # all is frozen: there is nothing to plan
        check_surroundings(itertools.chain(inputs.tensors, self.model.parameters(), self.model.buffers()))
        with self._lock:  # a capture in another thread puts tensors of its own into the model for a while
            step = self.step_for(inputs)
            primals = [*(slot.read() for slot in step.captured.slots), *inputs.tensors]
        return step(primals)

    def plan_for(self, inputs: FlatInputs) -> Plan:
        """The plan for an input signature; makes it if it isn't there."""
        return self._entry(inputs)[0]

    def step_for(self, inputs: FlatInputs) -> TrainingStep:
        """The emitted step for an input signature; plans it if it isn't there."""
        return self._entry(inputs)[1]

    def _entry(self, inputs: FlatInputs) -> tuple[Plan, TrainingStep]:
        with self._lock:
            key = self._key(inputs)
            entries = self._steps.get(key, [])
            for entry in entries:
                if entry[1].captured.fits(inputs):
                    entries.remove(entry)
                    entries.append(entry)
                    self._steps.move_to_end(key)
                    return entry[:2]
            before = next(reversed(self._steps), None)
            entry = (*self.plan_signature(self.model, self.original, inputs), tuple(self.model.modules()))
            self._keep(key, entry)
            if entry[1].captured.settles:  # the next call will find what this one leaves: it needs no plan of its own
                with entry[1].captured.settled():
                    self._keep((signature(self.model, inputs), key[1]), entry)
        made = entry[0]
        if before is not None and before[0][0] == key[0][0] and before[0][1] != key[0][1] and before[1] == key[1]:
            self._tell_of_change(changed(before[0][1], key[0][1])[:3])
        _log.info(
            "planned a training step: peak %s of %s (store-all %s), overhead %s; %d plans kept",
            format_bytes(made.peak_bytes),
            format_bytes(made.budget_bytes),
            format_bytes(made.store_all_peak_bytes),
            format_percent(made.overhead),
            sum(map(len, self._steps.values())),
        )
        return entry[:2]

    def _key(self, inputs: FlatInputs) -> _Key:
        return signature(self.model, inputs), self.plan_signature.held_bytes(self.model, inputs)

    def keep(self, inputs: FlatInputs, plan: Plan, step: TrainingStep) -> None:
        """Take a plan and its step as those for such inputs."""
        self._keep(self._key(inputs), (plan, step, tuple(self.model.modules())))

    def _keep(self, key: _Key, entry: _Entry) -> None:
        self._steps.setdefault(key, []).append(entry)
        self._steps.move_to_end(key)
        while sum(map(len, self._steps.values())) > self.max_plans:
            oldest = next(iter(self._steps))
            self._steps[oldest].pop(0)
            if not self._steps[oldest]:
                del self._steps[oldest]

    def _tell_of_change(self, names: list[str]) -> None:
        """Once, a value may settle at the first call (a default that a config gets); a second time it moves on."""
        self._changes += 1
        if self._changes == 1:
            _log.info("planned again because %s changed", ", ".join(names))
            return
        _log.warning(
            "rematerialize: planned again because %s changed, for the %d. time: a value that changes at every step "
            "belongs in a buffer or an input",
            ", ".join(names),
            self._changes,
        )

    def restore(self) -> None:
        """Give the model its own forward back.

        Raises
        ------
        RematerializeError
            If others have put theirs around this one: it would be lost.
        """
        outermost = vars(self.model)["forward"]
        if getattr(outermost, "__func__", outermost) is not self:
            raise RematerializeError(
                "another wrapper stands around the planned forward: take it off first (accelerate's for mixed "
                "precision: Accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
            )
        del vars(self.model)["forward"]
        if self.had_own:
            vars(self.model)["forward"] = self.own_forward

    def __getstate__(self) -> dict[str, Any]:
        """Plans hold code for this process: a copy plans again."""
        keep = ("model", "had_own", "own_forward", "plan_signature", "max_plans")
        return {name: getattr(self, name) for name in keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._steps = OrderedDict()
        self._lock = threading.RLock()
        self._changes = 0
        functools.update_wrapper(self, type(self.model).forward, updated=())
