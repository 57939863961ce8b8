"""One case, every ATen call of its step: does the trace believe the layout that the real kernel returns?

A trace leaves out a ``contiguous()`` where its fake kernels report a contiguous tensor, so that a wrong report can
become a wrong result. Each call is repeated with its arguments in other layouts.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.conformance.cases import SEED, Case
from benchmarks.conformance.judge import NothingToTrain, loss_of
from benchmarks.conformance.records import Verdict
from rematerialize.capture.kernel_layouts import faking

aten = torch.ops.aten

COMBINATIONS = 40  # of layouts per call
SIZES = 6  # that an op is tried with, per types of its tensors

# Kernels that read indices or opaque buffers of their own forward: other layouts of them crash the process.
_UNSAFE = frozenset({aten.adaptive_max_pool3d_backward.default, aten.mkldnn_rnn_layer_backward.default})

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
_done: dict[Any, set[Any]] = {}  # sizes, by op and types, that an earlier case of this process has compared


def judge_layouts(case: Case) -> Verdict:
    """Return "pass", "failed" with the calls whose layout is misreported, or "skipped" where eager can't run."""
    calls = _Calls()
    try:
        model, args, kwargs = case.make()
        with calls:
            loss_of(pytree.tree_leaves(model(*args, **kwargs))).backward()  # type: ignore[no-untyped-call]
    except NothingToTrain:
        pass  # its forward was seen
    except Exception as error:
        return Verdict(case.name, case.index, case.dtype, "skipped", "eager raises", str(error)[:200])
    twins = (twin for call in calls.found for twin in (call, _halved(call), *_narrowed(call)))
    wrong = sorted({told for twin in twins for told in misreports(twin)})
    if wrong:
        return Verdict(case.name, case.index, case.dtype, "failed", "a misreported layout", "; ".join(wrong)[:700])
    return Verdict(case.name, case.index, case.dtype, "pass")


class _Calls(TorchDispatchMode):
    """Notes calls of functional ops on strided tensors, one per op and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Call] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = op._schema
        if not schema.is_mutable and not any(item.alias_info for item in schema.returns) and op not in _UNSAFE:
            leaves = pytree.tree_leaves((args, kwargs))
            done = _done.setdefault((op, *(leaf.dtype for leaf in leaves if isinstance(leaf, Tensor))), set())
            key = tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf)[:40] for leaf in leaves)
            if key not in done and len(done) < SIZES and any(_has_layout(leaf) for leaf in leaves):
                done.add(key)
                # Their values now: the step may write over them.
                kept = pytree.tree_map(lambda leaf: leaf.detach().clone() if _strided(leaf) else leaf, (args, kwargs))
                self.found.append((op, *kept))
        return op(*args, **kwargs)


def _strided(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


def _has_layout(leaf: Any) -> bool:
    return _strided(leaf) and leaf.dim() >= 2 and leaf.numel() > 1


def _halved(call: Call) -> Call:
    """The call in bfloat16: fake kernels take other ways then."""
    op, args, kwargs = call
    return op, *pytree.tree_map(lambda leaf: leaf.bfloat16() if _is_single(leaf) else leaf, (args, kwargs))


def _narrowed(call: Call) -> Iterator[Call]:
    """The call with one dimension of all its tensors, and what it has one of for each element, cut to a single one."""
    op, args, kwargs = call
    leaves, structure = pytree.tree_flatten((args, kwargs))
    if any(_strided(leaf) and not leaf.is_floating_point() for leaf in leaves):
        return  # indices would point outside, which kills the process
    for dim in range(max((leaf.dim() for leaf in leaves if _has_layout(leaf)), default=0)):
        sizes = {leaf.shape[dim] for leaf in leaves if _has_layout(leaf) and leaf.dim() > dim}
        cut = [_cut(leaf, dim, sizes) if _strided(leaf) else leaf for leaf in leaves]
        yield op, *pytree.tree_unflatten(cut, structure)


def _cut(value: Tensor, dim: int, sizes: set[int]) -> Tensor:
    if value.dim() == 1:
        return value[:1] if value.shape[0] in sizes else value
    return value.narrow(dim, 0, 1) if value.dim() > dim else value


def _is_single(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == torch.float32


def misreports(call: Call) -> Iterator[str]:
    """Yield where the fake kernel of a call, in other layouts of its tensors, reports one that the real one doesn't."""
    op, args, kwargs = call
    leaves, structure = pytree.tree_flatten((args, kwargs))
    choices = [list(_layouts(leaf)) if _has_layout(leaf) else [leaf] for leaf in leaves]
    for some in _some(choices):
        try:
            torch.manual_seed(SEED)
            real_args, real_kwargs = pytree.tree_unflatten(some, structure)
            real = pytree.tree_leaves(op(*real_args, **real_kwargs))
            mode = FakeTensorMode()
            fakes = [mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf for leaf in some]
            fake_args, fake_kwargs = pytree.tree_unflatten(fakes, structure)
            with faking(mode):
                fake = pytree.tree_leaves(op(*fake_args, **fake_kwargs))
        except Exception:  # a layout that the kernel doesn't take, or no fake kernel
            continue
        for index, (ours, theirs) in enumerate(zip(fake, real, strict=True)):
            counts = _strided(theirs) and theirs.dim() > 1 and theirs.numel() and ours.shape == theirs.shape
            if counts and ours.stride() != theirs.stride():
                given = ", ".join(str(tuple(leaf.stride())) for leaf in some if isinstance(leaf, Tensor))
                yield f"{op} {index} of strides {given}: {tuple(theirs.stride())}, not {tuple(ours.stride())}"
                return


def _some(choices: Sequence[Sequence[Any]]) -> list[list[Any]]:
    total = 1
    for choice in choices:
        total *= len(choice)
    if total <= COMBINATIONS:
        return [list(combination) for combination in itertools.product(*choices)]
    draw = random.Random(SEED)
    return [[draw.choice(choice) for choice in choices] for _ in range(COMBINATIONS)]


def _layouts(value: Tensor) -> Iterator[Tensor]:
    """The same values: contiguous, permuted, channels last, channels last with gaps, and floats expanded."""
    yield value.contiguous()
    dims = list(range(value.dim()))
    channels_last = [0, *dims[2:], 1] if dims[2:] else dims[::-1]
    for order in (dims[::-1], channels_last):
        yield _ordered(value, order)
    if value.dim() == 4:  # with strides of their own for dimensions of one element
        yield torch.empty(value.shape, dtype=value.dtype, memory_format=torch.channels_last).copy_(value)
    gaps = value.new_zeros((*value.shape[:-1], 2 * value.shape[-1]))
    gaps[..., ::2] = value
    yield _ordered(gaps, channels_last)[..., ::2]
    if value.is_floating_point():
        yield value[:1].contiguous().expand(value.shape)


def _ordered(value: Tensor, outer_to_inner: Sequence[int]) -> Tensor:
    back = [outer_to_inner.index(dim) for dim in range(value.dim())]
    return value.permute(*outer_to_inner).contiguous().permute(back)
