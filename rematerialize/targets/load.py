"""From a target's name to a model in train mode with example inputs, real or fake."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rematerialize.analytic import on_fake_tensors
from rematerialize.device_table import DeviceSpec
from rematerialize.errors import TargetError
from rematerialize.targets import hf
from rematerialize.targets.blocks import checkpoint_blocks
from rematerialize.targets.devices import Device, find_device
from rematerialize.targets.factory import blame, described, find_factory
from rematerialize.targets.inputs import argument_hint, batch_of, make_inputs, resized
from rematerialize.targets.names import TargetName, parse_target, zoo_entry
from rematerialize.targets.specs import InputSpec, parse_dtype, parse_specs
from rematerialize.torch_private import tree_flatten
from rematerialize.zoo.spec import Inputs

_SEED = 0  # of the parameters: the same target has the same ones at every load


@dataclass(frozen=True, slots=True)
class Target:
    """A model to train, and one call of it.

    Attributes
    ----------
    name : str
        As it was asked for.
    model : nn.Module
        In train mode.
    inputs : tuple or dict
        Positional, or keyword arguments.
    loss_of : callable
        Maps the forward's outputs to the scalar to call ``backward`` on.
    fake : bool
        Whether model and inputs are fake tensors, with shapes and no storage.
    spec : DeviceSpec or None
        The device whose figures give the costs, when it isn't here.
    batch_dim : int
        The dimension that `with_batch` resizes.
    note : str
        Where activation checkpointing was put, if it was.
    """

    name: str
    model: nn.Module
    inputs: Inputs
    loss_of: Callable[[Any], Tensor]
    fake: bool = False
    spec: DeviceSpec | None = None
    batch_dim: int = 0
    note: str = ""

    @property
    def batch(self) -> int:
        """The batch of the example inputs: the size along `batch_dim` of the first tensor that has it."""
        return batch_of(self.inputs, self.batch_dim)

    def with_batch(self, batch: int) -> Target:
        """Return the same model with inputs of another batch; see `inputs.resized`."""
        return replace(self, inputs=resized(self.inputs, batch, self.batch_dim))


def load(
    target: str,
    specs: Sequence[str] = (),
    *,
    dtype: str | None = None,
    device: str | None = None,
    batch: int | None = None,
    batch_dim: int = 0,
    fake: bool = False,
    seed: int = _SEED,
    per_block: bool = False,
) -> Target:
    """Make what a target names.

    Parameters
    ----------
    target : str
        ``pkg.mod:factory``, ``file.py:factory``, ``hf:config.json`` or ``zoo:name``.
    specs : sequence of str
        Example inputs, such as ``input_ids=int64[8,2048]``; they replace the target's own.
    dtype : str, optional
        Torch's default type while the target is made.
    device : str, optional
        "cpu", "cuda", or a name of the device table: unless that device is here, tensors are fake.
    batch : int, optional
        Resize the example inputs to this batch, along ``batch_dim``.
    fake : bool
        Make fake tensors whatever the device.
    seed : int
        For the parameters; the global generator is left as it was.
    per_block : bool
        With `torch.utils.checkpoint` around each natural block: by hand for most of the zoo, else by `blocks`' rule.

    Returns
    -------
    Target

    Raises
    ------
    TargetError
        If anything can't be read or found, or the target's own code raises.
    """
    name, wanted = parse_target(target), parse_specs(specs)
    default = None if dtype is None else parse_dtype(dtype, "for --dtype", floating=True)
    found = find_device(device)
    fake = fake or found.spec is not None
    if name.kind == "zoo" and zoo_entry(name.where).fake_only and not fake:
        raise TargetError(
            f"{target} is too large for real tensors; give a --device of the table, such as "
            "'NVIDIA H100 80GB' (its costs are computed)"
        )

    def make() -> Target:
        with _default_dtype(default):
            made = _made(name, wanted, per_block, seed)
            return made if batch is None else replace(made, batch_dim=batch_dim).with_batch(batch)

    with torch.random.fork_rng(devices=[]), _faking(target) if fake else contextlib.nullcontext():
        made = on_fake_tensors(make) if fake else _placed(make(), device, found)
    return replace(made, fake=fake, spec=found.spec, batch_dim=batch_dim)


@contextlib.contextmanager
def _faking(target: str) -> Iterator[None]:
    """What asks for values fails on fake tensors; torch's own words for that help nobody."""
    try:
        yield
    except TargetError as error:
        cause = error.__cause__
        if cause is None or "fake" not in type(cause).__module__:
            raise
        raise TargetError(
            f"{target} reads a tensor's value while it is made, which fake tensors don't have: make it without, or "
            f"plan it on a --device that is here ({error})"
        ) from cause


@contextlib.contextmanager
def _default_dtype(name: str | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    if name is not None:
        torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _made(name: TargetName, specs: Sequence[InputSpec], per_block: bool, seed: int) -> Target:
    by_hand = name.kind == "zoo" and per_block and zoo_entry(name.where).per_block is not None
    target = _plain(name, specs, by_hand, seed)
    if per_block:
        place = "by hand" if by_hand else checkpoint_blocks(target.model)
        target = replace(target, note=place)
    return target


def _plain(name: TargetName, specs: Sequence[InputSpec], by_hand: bool, seed: int) -> Target:
    if name.kind == "hf":
        return _checked(name, *hf.make(name, specs, seed), default_loss)
    if name.kind == "zoo":
        entry = zoo_entry(name.where)
        loss_of, who = entry.loss_of, name.text
        factory: Callable[[], Any] = partial(
            entry.per_block if by_hand and entry.per_block is not None else entry.make, name.scale
        )
    else:
        loss_of, who = default_loss, f"the factory {name.text}"
        factory = find_factory(name)
    with blame(who):
        torch.manual_seed(seed)  # not before: what is imported may draw, at the first import only
        made: Any = factory()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        what = f"{len(made)} values" if isinstance(made, tuple) else described(made)
        if isinstance(made, tuple) and len(made) == 2:
            what = f"{described(model)} as its model"
        raise TargetError(
            f"the factory {name.text!r} returned {what}; it must return (model, example_inputs) or a model"
        )
    if specs:
        inputs = make_inputs(specs, model)
    elif inputs is None:
        raise TargetError(
            f"the factory {name.text!r} returned a model alone ({type(model).__name__}); it must return "
            f"(model, example_inputs), or give the inputs, such as {argument_hint(model)}"
        )
    return _checked(name, model, inputs, loss_of)


def _checked(name: TargetName, model: nn.Module, inputs: Any, loss_of: Callable[[Any], Tensor]) -> Target:
    if not isinstance(inputs, (tuple, dict)):
        raise TargetError(
            f"the factory {name.text!r} returned {described(inputs)} as example inputs; it must be a tuple "
            "of arguments or a dict of keyword arguments"
        )
    if not model.training:  # a part that its author froze in eval mode stays so
        model.train()
    return Target(name.text, model, inputs, loss_of)


def _placed(target: Target, asked: str | None, found: Device) -> Target:
    """Move model and inputs where they were asked to be."""
    if asked is None or found.here is None:
        return target
    with blame(f"moving {target.name} to {found.here}"):
        model = target.model.to(found.here)
        inputs = _moved(target.inputs, found.here)
    return replace(target, model=model, inputs=inputs)


def _moved(inputs: Inputs, device: str) -> Inputs:
    from rematerialize.torch_private import tree_unflatten

    flat, spec = tree_flatten(inputs)
    moved: Inputs = tree_unflatten([leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in flat], spec)
    return moved


def default_loss(outputs: Any) -> Tensor:
    """The scalar to differentiate, for a target that doesn't say.

    The output when it is a scalar; else the ``loss`` among the outputs; else the sum of the means of all
    differentiable outputs.

    Raises
    ------
    TargetError
        If nothing among the outputs can be differentiated.
    """
    named = outputs.get("loss") if isinstance(outputs, dict) else getattr(outputs, "loss", None)
    for one in (outputs, named):
        if isinstance(one, Tensor) and one.dim() == 0 and one.requires_grad:
            return one
    parts = [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not parts:
        raise TargetError("the forward returns nothing that can be differentiated: a training step needs a loss")
    means = [(torch.view_as_real(part) if part.is_complex() else part).mean() for part in parts]
    return torch.stack([mean.float() for mean in means]).sum() if len(means) > 1 else means[0]
