"""Random generators that belong to a model or a call, and what a forward must not do to any generator.

A recorded step draws from the generators from which the forward drew, in its order. What it can't repeat is a
forward that sets a generator's state: that is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rematerialize import torch_private as private
from rematerialize.errors import CaptureError

_SEEDED = (
    "the forward sets the state of a random generator{place} (manual_seed, set_state, fork_rng), or reads its seed, "
    "which a recorded step can't repeat: draw from a torch.Generator that the module keeps as an attribute "
    "(generator=self.generator), or set the seed before the forward is called"
)


def own_generators(model: nn.Module, leaves: tuple[Any, ...]) -> dict[int, torch.Generator]:
    """The generators that a model keeps as attributes or that a call passes, by their identity in torch."""
    kept = [value for module in model.modules() for value in vars(module).values()]
    defaults = (torch.default_generator, *torch.cuda.default_generators)
    found = [value for value in (*kept, *leaves, *defaults) if isinstance(value, torch.Generator)]
    return {private.generator_key(generator): generator for generator in found}


class StateMoved(CaptureError):
    """A generator's state was set during a trace, by the forward or, where there are some, by another thread."""


class unseeded_generators:
    """A context for a call of a traced forward: on exit every generator has the state that it had on entry.

    Nothing draws during a trace, so a state that moves was set, which raises StateMoved. The states start from one
    that nobody sets, so that a seed that has been set before the forward, too, is seen, and move on with every draw
    (`drew`), so that one that goes back to an earlier state is.
    """

    def __init__(self, generators: dict[int, torch.Generator]) -> None:
        self.generators = list(generators.values())
        self.places = {key: at for at, key in enumerate(generators)}
        self.draws = 0
        self.moved = False

    def __enter__(self) -> None:
        with private.outside_of_modes():
            self.before = [generator.get_state() for generator in self.generators]
            self.odd = [self._odd(generator) for generator in self.generators]
            for generator, state in zip(self.generators, self.odd, strict=True):
                generator.set_state(state)

    def drew(self, generator: torch.Generator) -> None:
        """Move a generator on, which was drawn from: nothing else does in a trace."""
        at = self.places.get(private.generator_key(generator))
        if at is None:
            return
        self.draws += 1
        with private.outside_of_modes():
            self.moved |= not torch.equal(generator.get_state(), self.odd[at])
            self.odd[at] = self._odd(generator)
            generator.set_state(self.odd[at])

    def _odd(self, generator: torch.Generator) -> Tensor:
        return torch.Generator(generator.device).manual_seed(0x0DD5EED + self.draws).get_state()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with private.outside_of_modes():
            for generator, state, before in zip(self.generators, self.odd, self.before, strict=True):
                self.moved |= not torch.equal(generator.get_state(), state)
                generator.set_state(before)
        if self.moved and kind is None:
            raise StateMoved(_SEEDED.format(place=""))


def refuse_seeding() -> None:
    """Raise where a forward seeds; it names the user's line."""
    line = private.user_line()
    raise CaptureError(_SEEDED.format(place=f" at {line}" if line else ""))


def resolve_generators(joint: private.JointTrace, generators: dict[int, torch.Generator]) -> None:
    """Give the nodes that stand for generators their value.

    Raises
    ------
    CaptureError
        For one that is neither an attribute of a module nor an argument: the next call might draw from another.
    """
    for node in joint.graph.nodes:
        value = getattr(joint.owner, str(node.target), None) if node.op == "get_attr" else None
        if not isinstance(value, torch.Generator):
            continue
        known = generators.get(private.generator_key(value))
        if known is None:
            raise CaptureError(
                f"the forward draws from a torch.Generator{_at(node)} that is neither an attribute of a module nor an "
                "argument: keep it as an attribute (self.generator = ...), or pass it to the forward"
            )
        node.meta["val"] = known


def _at(node: Any) -> str:
    return f" at {node.meta['source']}" if node.meta.get("source") else ""


def generator_of(node: Any) -> Any:
    """The node of the generator that a random call was given, None for the default one."""
    given = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Generator)]
    return given[0] if given else None
