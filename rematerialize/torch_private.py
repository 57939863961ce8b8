"""Every private torch name that the package touches, and nothing else.

Torch renames its internals without notice: when a release breaks the package, it breaks here. Each function
states what it needs from torch, so that a replacement can be judged. Checked on torch 2.11 to 2.13.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import operator
import os
import re
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, TypeGuard

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, fx, nn
from torch._C import DispatchKey
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig
from torch._functorch import eager_transforms
from torch._functorch._aot_autograd import graph_capture_wrappers
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    InputMutationAOTOutput,
    IntermediateBaseAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch._aot_autograd.functional_utils import gen_alias_from_base
from torch._functorch._aot_autograd.schemas import OutputType
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._library import simple_registry
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd.function import FunctionCtx
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, get_proxy_mode, get_proxy_slot
from torch.fx.graph import CodeGen
from torch.fx.node import _side_effectful_functions
from torch.library import Library
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

# The trace patches process-wide state of torch (the composite kernels): one trace at a time.
_TRACE_LOCK = threading.RLock()

# Their Python kernels are needed: the C++ ones hide from functionalization that they write running statistics.
_KEEP_PYTHON_KERNEL = frozenset(
    {"aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::broadcast_tensors", "aten::empty"}
)

disable_autocast = torch._C._DisableAutocast
tree_flatten = pytree.tree_flatten
tree_unflatten = pytree.tree_unflatten
tree_map = pytree.tree_map
TreeSpec = pytree.TreeSpec
DeviceType = torch._C._autograd.DeviceType  # what the profiler's events name devices by


@contextlib.contextmanager
def fake_mode() -> Iterator[None]:
    """Make every new tensor fake; initializers that read values, which fake tensors lack, do nothing."""
    own = nn.init._no_grad_trunc_normal_
    nn.init._no_grad_trunc_normal_ = lambda tensor, *args, **kwargs: tensor
    try:
        with FakeTensorMode():
            yield
    finally:
        nn.init._no_grad_trunc_normal_ = own


@dataclass(frozen=True, slots=True)
class OutputAlias:
    """How a flat output relates to others: ``kind`` is "value", "input", "input_view" or "base_view".

    ``index`` is the aliased primal for the input kinds, and the position among the graph's outputs (user
    outputs, then intermediate bases) for "base_view".
    """

    kind: str
    index: int
    requires_grad: bool
    view_sequence: Any = None


@dataclass(frozen=True, slots=True)
class JointTrace:
    """The joint graph of a flat function and the meaning of its inputs and outputs, by position.

    ``tangents[k]`` pairs the k-th tangent placeholder with the position of its output among ``outputs``
    (user outputs, then intermediate bases). ``mutations`` pairs primal positions with the nodes of their
    new values, ``gradients[i]`` belongs to primal ``i``, whose ``meta["goes_on"]`` tells whether autograd goes on
    behind it. Where there are several tangents, a backward node's ``meta["reached_by"]`` has the positions of those
    that autograd runs it for. ``tellers`` are the users' functions that tell absent gradients from zeros: for each of
    their outputs the tangents that reach it.
    """

    graph: fx.Graph
    owner: nn.Module
    primals: tuple[fx.Node, ...]
    tangents: tuple[tuple[fx.Node, int], ...]
    outputs: tuple[fx.Node | None, ...]
    aliases: tuple[OutputAlias, ...]
    mutations: tuple[tuple[int, fx.Node], ...]
    gradients: tuple[fx.Node | None, ...]
    tellers: tuple[tuple[frozenset[int], ...], ...] = ()


class UnsupportedTraceError(Exception):
    """The trace succeeded but holds a construct that the package doesn't handle."""


@contextlib.contextmanager
def _eager_composites() -> Iterator[None]:
    """Take away Python decompositions that eager doesn't run, so that the trace holds eager's own kernels.

    With them ``upsample_nearest2d`` becomes index arithmetic, ``dropout`` another kernel, and an LSTM one op
    per gate: slower than eager, and not bit-equal to it.
    """
    removed = []
    try:  # from here on: an interrupt may come at any line
        for packet_name in dir(torch.ops.aten):
            packet = getattr(torch.ops.aten, packet_name)
            for overload in packet.overloads() if hasattr(packet, "overloads") else ():
                op = getattr(packet, overload)
                if op._schema.name in _KEEP_PYTHON_KERNEL:
                    continue
                for key in (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd):
                    if key in op.py_kernels:
                        removed.append((op, key, op.py_kernels[key]))
                        del op.py_kernels[key]
                        op._dispatch_cache.clear()
        yield
    finally:
        for op, key, kernel in removed:
            op.py_kernels[key] = kernel
            op._dispatch_cache.clear()


# Eager raises its LinAlgError here. It has no output, so that a trace would drop it.
linalg_check = torch.ops.aten._linalg_check_errors.default
# Ops that only raise, or don't.
CHECKS = frozenset({linalg_check, torch.ops.aten._assert_async.msg, torch.ops.aten._assert_async.default})


@contextlib.contextmanager
def _plain_checks() -> Iterator[None]:
    """Record the checks of linear algebra as plain calls.

    torch registers them as effects, for which a trace gets inputs and outputs more: tokens that keep an order.
    """
    holder = simple_registry.singleton.find("aten::_linalg_check_errors").effect
    effect, kept = holder._effect, linalg_check in _side_effectful_functions
    holder._effect = None
    _side_effectful_functions.add(linalg_check)
    try:
        yield
    finally:
        holder._effect = effect
        if not kept:
            _side_effectful_functions.discard(linalg_check)


# For an op, its arguments, its keyword arguments, a position among its results and the fake one there: its real
# strides, None if it has them.
LayoutRule = Callable[[Any, Sequence[Any], Mapping[str, Any], int, Tensor], Sequence[int] | None]


@dataclass(frozen=True, slots=True)
class Result:
    """A contiguous result of a kernel, on the device of its first argument."""

    shape: tuple[int, ...]
    dtype: torch.dtype


# As LayoutRule, without keyword arguments, for the type that the kernel returns.
DtypeRule = Callable[[Any, Sequence[Any], int, Tensor], torch.dtype | None]
# For an op, its arguments and keyword arguments: its result, None where the fake kernel is to be asked.
ResultRule = Callable[[Any, Sequence[Any], Mapping[str, Any]], Result | None]


@dataclass(slots=True)
class _Sums:
    """The sums of gradients that autograd's engine makes during a trace, numbered in their order.

    ``in_place`` are those that eager writes over the first summand; ``pending`` is the one whose node was recorded
    and whose result isn't there yet.
    """

    in_place: frozenset[int] = frozenset()
    count: int = 0
    pending: int | None = None
    formulas: int = 0  # of an inner gradient, that are at work

    def note(self, node: fx.Node) -> None:
        if node.target is torch.ops.aten.add.Tensor and not self.formulas and _is_engines():
            node.meta["summed"] = self.pending = self.count
            self.count += 1

    def watch(self, outputs: Any) -> None:
        """Tell the formulas of an inner gradient from the engine, as torch does for the step's own backward."""

        def begin(*_: Any) -> None:
            self.formulas += 1

        def end(*_: Any) -> None:
            self.formulas -= 1

        tensors = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        seen = {*waiting}
        while waiting:
            node = waiting.pop()
            node.register_prehook(begin)
            node.register_hook(end)
            following = {after for after, _ in node.next_functions if after is not None} - seen
            seen |= following
            waiting.extend(following)

    def strides(self, op: Any, args: Sequence[Any]) -> Sequence[int] | None:
        """Those of the sum whose node was recorded last, if the first summand keeps them."""
        if op is not torch.ops.aten.add.Tensor or self.pending is None:
            return None
        number, self.pending = self.pending, None
        return args[0].stride() if number in self.in_place else None


def _is_engines() -> bool:
    """Whether autograd's engine itself calls the op at work, not a formula of the step or a user's hook."""
    outside = torch._C._current_graph_task_id() == -1 or "in_grad_fn" in fx.traceback.current_meta
    if outside or torch.is_grad_enabled():  # where gradients are recorded, every sum is new
        return False
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not _RUN_BACKWARD:
        if is_users(frame.f_code.co_filename):
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return True


@contextlib.contextmanager
def real_layouts(
    strides: LayoutRule, dtypes: DtypeRule, results: ResultRule, sums: _Sums | None = None
) -> Iterator[None]:
    """Give the results of fake kernels the layouts and types that the real ones return; ``results`` knows some ops
    altogether.
    """
    with _TRACE_LOCK:
        dispatch = FakeTensorMode.dispatch

        def laid_out(mode: FakeTensorMode, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            known = results(op, args, kwargs)
            if known is not None:
                with mode:
                    return torch.empty(known.shape, dtype=known.dtype, device=args[0].device)
            try:
                result = dispatch(mode, op, types, args, kwargs)
            except ValueError:
                if op is not torch.ops.aten.view.default or not _functionalized_op().endswith("_"):
                    raise
                # In eager an op in place writes through a view. A trace has a new value, in a layout of its own, that
                # it views as the base.
                with mode:
                    return torch.empty(args[1], dtype=args[0].dtype, device=args[0].device)
            if isinstance(result, Tensor):
                kept = sums.strides(op, args) if sums is not None else None
                if kept is not None:
                    return _laid_out(mode, result, kept, None)
                return as_real(mode, op, args, kwargs, 0, result)
            if isinstance(result, tuple):
                return tuple(
                    as_real(mode, op, args, kwargs, at, one) if isinstance(one, Tensor) else one
                    for at, one in enumerate(result)
                )
            return result

        def as_real(mode: FakeTensorMode, op: Any, args: Any, kwargs: Any, at: int, fake: Tensor) -> Tensor:
            found, dtype = strides(op, args, kwargs, at, fake), dtypes(op, args, at, fake)
            if _is_written_over(op, args, fake, fake.stride() if found is None else found):
                return _laid_out(mode, fake, args[0].stride(), dtype)
            if found is not None and args and isinstance(args[0], Tensor) and storage_key(fake) == storage_key(args[0]):
                with mode:
                    return fake.as_strided(fake.shape, found, fake.storage_offset())
            return _laid_out(mode, fake, found, dtype)

        FakeTensorMode.dispatch = laid_out  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            FakeTensorMode.dispatch = dispatch  # type: ignore[method-assign]


def _is_written_over(op: Any, args: Sequence[Any], result: Tensor, strides: Sequence[int]) -> bool:
    """Whether an op of another layout stands for one in place on a whole tensor, which keeps its own in eager: formulas
    of the backward ask for it.
    """
    target = args[0] if args else None
    if not isinstance(target, Tensor) or tuple(strides) == target.stride() or not returns_new_tensors(op):
        return False
    if len(op._schema.returns) > 1:
        return False
    alike = (target.shape, target.dtype) == (result.shape, result.dtype)
    return alike and is_non_overlapping_and_dense_or_false(target) and _functionalized_op() == _in_place_name(op)


def _laid_out(mode: FakeTensorMode, fake: Tensor, strides: Sequence[int] | None, dtype: torch.dtype | None) -> Tensor:
    if strides is None and dtype is None:
        return fake
    with mode:
        return torch.empty_strided(
            fake.shape, fake.stride() if strides is None else strides, dtype=dtype or fake.dtype, device=fake.device
        )


# Called in place of an op on fake tensors, with a function that runs it.
Follower = Callable[[Callable[[], Any], Any, tuple[Any, ...], dict[str, Any]], Any]


@contextlib.contextmanager
def _followed(follow: Follower) -> Iterator[None]:
    """Show each call on fake tensors of this thread to ``follow``, which runs or answers it."""
    dispatch, thread = FakeTensorMode.dispatch, threading.get_ident()

    def followed(mode: FakeTensorMode, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if threading.get_ident() != thread:
            return dispatch(mode, op, types, args, kwargs)
        return follow(lambda: dispatch(mode, op, types, args, kwargs), op, tuple(args), kwargs)

    FakeTensorMode.dispatch = followed  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        FakeTensorMode.dispatch = dispatch  # type: ignore[method-assign]


@dataclass(frozen=True, slots=True)
class FakeRules:
    """What a trace does otherwise than torch's fake kernels, see `real_layouts` and `_followed`.

    ``sums_in_place`` are the sums of gradients, by their number in an earlier trace, that keep the first one's strides.
    """

    strides: LayoutRule
    dtype: DtypeRule
    result: ResultRule
    follow: Follower
    sums_in_place: frozenset[int] = frozenset()


@contextlib.contextmanager
def _silent_fakes() -> Iterator[None]:
    """Keep torch from logging the stack of an error that is told, or that another way to trace gets round."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    old, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = old


@contextlib.contextmanager
def _recorded_sources(sums: _Sums) -> Iterator[None]:
    """Number the engine's sums of gradients, and note on each forward node the user's line that asked for it
    (``meta["source"]``), the innermost module that it was called in (``meta["module"]``), whether gradients were off
    (``meta["no_grad"]``), and whether it is what functionalization made of an in-place op (``meta["in_place"]``).

    torch can record whole stack traces, at a millisecond per node; one walk over the frames costs microseconds.
    """
    create_node = PythonKeyTracer.create_node

    def noted(self: PythonKeyTracer, *args: Any, **kwargs: Any) -> fx.Node:
        node = create_node(self, *args, **kwargs)
        source, module = user_place()
        if source:
            node.meta["source"] = source
        if module is not None:
            node.meta["module"] = module
        if not torch.is_grad_enabled():
            node.meta["no_grad"] = True
        # Not transpose_ and its like, which change no values: what they return is a view, laid out as it says.
        if returns_new_tensors(node.target) and _functionalized_op() == _in_place_name(node.target):
            node.meta["in_place"] = True
        sums.note(node)
        return node

    PythonKeyTracer.create_node = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        PythonKeyTracer.create_node = create_node  # type: ignore[method-assign]


_FUNCTIONALIZE = inspect.unwrap(FunctionalTensorMode.__torch_dispatch__).__code__


def _functionalized_op() -> str:
    """The name of the ATen op that functionalization is at work on between here and the traced function, if any."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not _FlatModule.forward.__code__:
        if frame.f_code is _FUNCTIONALIZE:
            return str(getattr(getattr(frame.f_locals.get("func"), "_schema", None), "name", ""))
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _in_place_name(op: torch._ops.OpOverload) -> str:
    return f"{op._schema.name.removesuffix('_functional')}_"


def generator_key(generator: torch.Generator) -> int:
    """Identity of a generator: the trace hands out Python objects of its own for it."""
    return int(generator._cdata)  # type: ignore[attr-defined]


# For a tensor that autocast casts, and the dtype: what it is cast to, None to cast it as ever.
Caster = Callable[[Tensor, torch.dtype], Tensor | None]


def cast_under_autograd(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast's kernels call on an argument."""
    cast: Tensor = torch.ops.aten.to.dtype.decompose(tensor, dtype)
    return cast


@contextlib.contextmanager
def autocast_casts(cast: Caster, forget: Callable[[], None], *, enabled: bool) -> Iterator[None]:
    """Ask ``cast`` where autocast casts an argument in this thread; call ``forget`` where its outermost region ends.

    ``enabled`` is what ``torch.is_autocast_cache_enabled()`` tells meanwhile, which a trace switches off.
    """
    thread, clear, switch, old = (
        threading.get_ident(),
        torch.clear_autocast_cache,
        torch.set_autocast_enabled,
        torch.is_autocast_cache_enabled(),
    )
    on = {device: torch.is_autocast_enabled(device) for device in _AUTOCAST_KEYS}

    def to(tensor: Tensor, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Tensor:
        # Autocast's own kernels exclude its key; that alone is so wherever it is off, too.
        device = tensor.device.type
        if threading.get_ident() == thread and on.get(device) and _excluded(_AUTOCAST_KEYS[device]):
            found = cast(tensor, dtype)
            if found is not None:
                return found
        result: Tensor = torch.ops.aten.to.dtype.decompose(tensor, dtype, *args, **kwargs)
        return result

    def switched(*args: Any) -> None:
        switch(*args)
        if threading.get_ident() == thread:
            device, now = args if len(args) == 2 else ("cuda", *args)
            on[device] = now

    def cleared() -> None:
        clear()
        if threading.get_ident() == thread:
            forget()

    library, remembered = Library("aten", "IMPL"), torch.ops.aten.to.dtype._dispatch_cache  # type: ignore[no-untyped-call]
    torch.set_autocast_cache_enabled(enabled)
    torch.clear_autocast_cache, torch.set_autocast_enabled = cleared, switched  # type: ignore[assignment]
    try:
        for key in ("AutogradCPU", "AutogradCUDA"):
            library.impl("to.dtype", to, key)  # type: ignore[no-untyped-call]
        remembered.clear()  # where an earlier trace of anything met the op, the Python dispatcher passes `to` by
        yield
    finally:
        torch.clear_autocast_cache, torch.set_autocast_enabled = clear, switch
        torch.set_autocast_cache_enabled(old)
        library._destroy()  # type: ignore[no-untyped-call]
        remembered.clear()


_AUTOCAST_KEYS = {"cpu": DispatchKey.AutocastCPU, "cuda": DispatchKey.AutocastCUDA}
_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded


def is_compiled(module: object) -> bool:
    """Whether torch.compile returned it."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def outside_of_modes() -> contextlib.AbstractContextManager[Any]:
    """During a trace: work on real tensors, unseen by it."""
    return _disable_current_modes()


class _Spied:
    """A generator whose state can't be set, nor its seed be read: ``refuse`` is called instead. Other threads may."""

    def __init__(self, generator: torch.Generator, refuse: Callable[[], None]) -> None:
        self._generator, self._refuse, self._thread = generator, refuse, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        if name in ("manual_seed", "seed", "set_state", "initial_seed") and threading.get_ident() == self._thread:
            self._refuse()
        return getattr(self._generator, name)


@contextlib.contextmanager
def spied_default_generator(refuse: Callable[[], None]) -> Iterator[None]:
    """Call ``refuse`` where torch.manual_seed, set_rng_state or fork_rng set the default generator's state."""
    scope = vars(torch.random)
    own = scope["default_generator"]
    scope["default_generator"] = _Spied(own, refuse)
    try:
        yield
    finally:
        scope["default_generator"] = own


# Where torch's attention decides for its fast path in evaluation, and the local variable that says why not.
_FAST_PATHS = {
    nn.MultiheadAttention.forward.__code__: "why_not_fast_path",
    nn.TransformerEncoderLayer.forward.__code__: "why_not_sparsity_fast_path",
}
_ONLY_IN_A_TRACE = ("some Tensor argument has_torch_function", "we are running make_fx tracing")


def only_a_trace_is_slow() -> bool:
    """Whether an attention that calls this is slow for the trace's sake alone: eager takes torch's fast path."""
    frame: types.FrameType | None = sys._getframe(1)
    for _ in range(40):
        if frame is None:
            break
        own = frame.f_locals if frame.f_code in _FAST_PATHS else {}
        if own.get(_FAST_PATHS.get(frame.f_code, "")) in _ONLY_IN_A_TRACE:
            needed = any(x is not None and x.requires_grad for x in own["tensor_args"])
            if not (needed and torch.is_grad_enabled()):
                return True
        frame = frame.f_back
    return False


_TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep
_OUR_FOLDER = os.path.dirname(__file__) + os.sep
_OUR_MODELS = _OUR_FOLDER + "zoo" + os.sep
_OUR_RUNNERS = _OUR_MODELS + "runners.py"  # calls the models' blocks: their own lines tell more


def is_users(file: str) -> bool:
    """Whether a source file is the user's, for messages: neither torch's nor ours; the zoo counts as theirs."""
    if file.startswith(_OUR_MODELS):
        return file != _OUR_RUNNERS
    return not file.startswith((_TORCH_FOLDER, _OUR_FOLDER, contextlib.__file__))


_CALL_OF_A_MODULE = nn.Module._call_impl.__code__
_RUN_BACKWARD = torch.autograd.graph._engine_run_backward.__code__


def user_line() -> str:
    """The innermost "file.py:12" outside torch between here and the traced function; "" outside it."""
    return user_place()[0]


def user_place() -> tuple[str, nn.Module | None]:
    """The innermost "file.py:12" outside torch, and the innermost module being called, between here and the traced
    function; "" and None outside it.
    """
    found, module = "", None
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _FlatModule.forward.__code__:
            return found, module
        if not found and is_users(code.co_filename):
            found = f"{os.path.basename(code.co_filename)}:{frame.f_lineno}"
        if module is None and code is _CALL_OF_A_MODULE:
            module = frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]
    return "", None


class _FlatModule(nn.Module):
    """A module without state around a flat function: the front door of torch's joint export."""

    def __init__(self, function: Callable[..., Sequence[Tensor]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *flat: Tensor) -> Sequence[Tensor]:
        return self.function(*flat)


@dataclass(slots=True)
class _Reach:
    """Which tangents reach nodes of autograd's graph, as bits of an integer.

    ``nodes`` is by sequence numbers; ``tellers`` has one entry per node of a user's that tells absent gradients
    from zeros (``set_materialize_grads(False)``): a mask for each of its outputs that any tangent reaches.
    """

    nodes: dict[int, int] = field(default_factory=dict)
    tellers: list[list[int]] = field(default_factory=list)


@contextlib.contextmanager
def _recorded_reach(sums: _Sums) -> Iterator[_Reach]:
    """Let ``sums`` know the formulas of gradients that the forward asks for. Collect, when the joint trace asks for
    its gradients, which tangents reach each node of autograd's graph.

    The traced ops don't tell: the zeros that ``fill_`` gives as its gradient come from no tangent.
    """
    found = _Reach()
    grad, set_materialize = torch.autograd.grad, FunctionCtx.set_materialize_grads
    telling: set[Any] = set()

    def noted(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1)
        if caller.f_globals.get("__name__") == graph_capture_wrappers.__name__:
            place = {id(tangent): i for i, tangent in enumerate(caller.f_locals["tangents"])}
            tangents = kwargs.get("grad_outputs", ())
            roots = [(o.grad_fn, o.output_nr, place[id(t)]) for o, t in zip(outputs, tangents, strict=True)]
            masks, parts = _reach(roots, telling)
            found.nodes = {node._sequence_nr(): mask for node, mask in masks.items()}
            found.tellers = [list(masks.values()) for masks in parts.values()]
        elif not kwargs.get("create_graph"):
            sums.watch(outputs)
        return grad(outputs, *args, **kwargs)

    def set_noted(ctx: Any, value: bool) -> None:
        if not value:
            telling.add(ctx)
        set_materialize(ctx, value)

    torch.autograd.grad = noted
    FunctionCtx.set_materialize_grads = set_noted  # type: ignore[assignment,method-assign]
    try:
        yield found
    finally:
        torch.autograd.grad = grad
        FunctionCtx.set_materialize_grads = set_materialize  # type: ignore[method-assign]


def _reach(
    roots: Iterable[tuple[Any, int, int]], wanted: Container[Any]
) -> tuple[dict[Any, int], dict[Any, dict[int, int]]]:
    """Masks of the nodes that are reached from roots (node, its output, position of the tangent); for those wanted
    also of each of their outputs.
    """
    masks: dict[Any, int] = {}
    parts: dict[Any, dict[int, int]] = {}

    def reach(node: Any, output: int, mask: int) -> None:
        masks[node] = masks.get(node, 0) | mask
        if node in wanted:
            part = parts.setdefault(node, {})
            part[output] = part.get(output, 0) | mask

    for node, output, position in roots:
        if node is not None:
            reach(node, output, 1 << position)
    readers: Counter[Any] = Counter()
    seen, waiting = set(masks), list(masks)
    while waiting:
        for following, _ in waiting.pop().next_functions:
            if following is None:
                continue
            readers[following] += 1
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    ready = [node for node in masks if not readers[node]]
    while ready:
        node = ready.pop()
        for following, output in node.next_functions:
            if following is None:
                continue
            reach(following, output, masks[node])
            readers[following] -= 1
            if not readers[following]:
                ready.append(following)
    return masks, parts


def trace_joint(
    function: Callable[..., Sequence[Tensor]],
    primals: Sequence[Tensor],
    rules: FakeRules,
) -> JointTrace:
    """Trace the functionalized joint forward-backward graph of ``function`` at the ATen level.

    Parameters
    ----------
    function : callable
        Takes the flat primals, returns flat tensors. Called several times, with fake tensors.
    primals : sequence of Tensor
        Distinct tensors; gradients are taken for those that require grad.
    rules : FakeRules
        What fake kernels do otherwise than torch's.

    Raises
    ------
    UnsupportedTraceError
        For constructs that need a runtime which the package doesn't have. Whatever ``function`` or torch
        raises passes through.
    """
    with (
        _TRACE_LOCK,
        contextlib.ExitStack() as stack,
        _eager_composites(),
        _plain_checks(),
        _users_anomaly_mode(),
        real_layouts(rules.strides, rules.dtype, rules.result, sums := _Sums(rules.sums_in_place)),
        _followed(rules.follow),
        _silent_fakes(),
        _recorded_sources(sums),
        _recorded_reach(sums) as reach,
        functorch_config.patch(backward_pass_autocast="off"),
    ):
        # A hit in its cache makes two tensors of outputs that are one, so that a trace would depend on those before it.
        FakeTensorMode.cache_clear()
        joint = aot_export_joint_with_descriptors(stack, _FlatModule(function), tuple(primals), {})
        traced = _read_joint(joint, len(primals))
        for node, primal in zip(traced.primals, primals, strict=True):
            node.meta["goes_on"] = not primal.is_leaf
        if len(traced.tangents) > 1:
            _tell_reach(traced, reach.nodes)
        _forget_real_tensors(traced)
        tellers = [tuple(_positions(mask) for mask in masks) for masks in reach.tellers if len({*masks}) > 1]
        return replace(traced, tellers=tuple(tellers))


def _forget_real_tensors(joint: JointTrace) -> None:
    """Drop what fake tensors remember of those that they were made of: a weak reference forbids ``swap_tensors``."""
    for node in joint.primals:
        mode = getattr(node.meta["val"], "fake_mode", None)
        if mode is not None:
            mode.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()


def _positions(mask: int) -> frozenset[int]:
    return frozenset(i for i in range(mask.bit_length()) if mask >> i & 1)


@contextlib.contextmanager
def _users_anomaly_mode() -> Iterator[None]:
    """Answer ``torch.is_anomaly_enabled()`` as outside of the trace, which turns it on to know lines of code."""
    own = torch.is_anomaly_enabled
    enabled = own()
    torch.is_anomaly_enabled = lambda: enabled
    try:
        yield
    finally:
        torch.is_anomaly_enabled = own


def _tell_reach(joint: JointTrace, reach: dict[int, int]) -> None:
    sets = {mask: _positions(mask) for mask in set(reach.values())}
    for node in joint.graph.nodes:
        mask = reach.get(node.meta.get("seq_nr", -1))
        if mask is not None and node.op == "call_function" and node.meta.get("partitioner_tag") == "is_backward":
            node.meta["reached_by"] = sets[mask]


def _read_joint(joint: Any, primal_count: int) -> JointTrace:
    graph_module = joint.graph_module
    metadata = joint._aot_state.fw_metadata
    if any(info.mutates_metadata or info.mutates_storage_metadata for info in metadata.input_info):
        raise UnsupportedTraceError(
            "it changes the shape or the storage of an input, a buffer or a parameter in place: make a new tensor "
            "(x = x.unsqueeze(0) rather than x.unsqueeze_(0))"
        )
    primals: list[fx.Node | None] = [None] * primal_count
    tangents: list[tuple[fx.Node, Any]] = []
    nodes = list(graph_module.graph.nodes)
    for node in nodes:
        if node.op != "placeholder":
            continue
        descriptor = node.meta["desc"]
        if isinstance(descriptor, PlainAOTInput):
            primals[descriptor.idx] = node
        elif isinstance(descriptor, TangentAOTInput):
            tangents.append((node, descriptor.output))
        else:
            raise UnsupportedTraceError(
                "two of its inputs, buffers or parameters share memory, and it writes into one of them: pass a clone() "
                "or write into a clone()"
            )
    output_node = nodes[-1]
    found = _read_outputs(output_node, len(metadata.output_info), primal_count)
    position = {repr(descriptor): i for i, descriptor in enumerate(found.descriptors)}
    paired = []
    for node, descriptor in tangents:
        key = repr(descriptor)
        if key not in position:
            raise UnsupportedTraceError(
                "it changes an input or a parameter that requires grad in place (Embedding's max_norm does, too): "
                "change a clone() of it, or change it between steps"
            )
        paired.append((node, position[key]))
    return JointTrace(
        graph=graph_module.graph,
        owner=graph_module,
        primals=tuple(node for node in primals if node is not None),
        tangents=tuple(paired),
        outputs=tuple(found.outputs),
        aliases=_read_aliases(metadata),
        mutations=tuple(found.mutations),
        gradients=tuple(found.gradients),
    )


@dataclass(slots=True)
class _Outputs:
    outputs: list[fx.Node | None]
    descriptors: list[Any]
    mutations: list[tuple[int, fx.Node]]
    gradients: list[fx.Node | None]


def _read_outputs(output_node: fx.Node, user_outputs: int, primal_count: int) -> _Outputs:
    found = _Outputs([None] * user_outputs, [None] * user_outputs, [], [None] * primal_count)
    for value, descriptor in zip(output_node.args[0], output_node.meta["desc"], strict=True):  # type: ignore[arg-type]
        if isinstance(descriptor, PlainAOTOutput):
            found.outputs[descriptor.idx] = value
            found.descriptors[descriptor.idx] = descriptor
        elif isinstance(descriptor, IntermediateBaseAOTOutput):
            found.outputs.append(value)
            found.descriptors.append(descriptor)
        elif isinstance(descriptor, InputMutationAOTOutput) and isinstance(descriptor.mutated_input, PlainAOTInput):
            found.mutations.append((descriptor.mutated_input.idx, value))
        elif isinstance(descriptor, GradAOTOutput) and isinstance(descriptor.grad_of, PlainAOTInput):
            found.gradients[descriptor.grad_of.idx] = value
        elif descriptor is not None and value is not None:
            raise UnsupportedTraceError(f"the forward returns a value of kind {type(descriptor).__name__}")
    return found


def _read_aliases(metadata: Any) -> tuple[OutputAlias, ...]:
    kinds = {
        OutputType.is_input: "input",
        OutputType.alias_of_input: "input_view",
        OutputType.alias_of_intermediate: "base_view",
        OutputType.alias_of_intermediate_save_as_output: "base_view",
        OutputType.alias_of_intermediate_base_is_user_output: "base_view",
    }
    user_outputs = len(metadata.output_info)
    aliases = []
    for info in metadata.output_info:
        kind = kinds.get(info.output_type, "value")
        index = info.base_idx if info.base_idx is not None and kind != "value" else -1
        if kind == "base_view" and info.output_type != OutputType.alias_of_intermediate_base_is_user_output:
            index += user_outputs
        aliases.append(OutputAlias(kind, index, info.requires_grad, info.view_meta_sequence))
    return tuple(aliases)


def view_again(base: Tensor, like: Tensor, alias: OutputAlias) -> Tensor:
    """Rebuild, differentiably, the view ``like`` of ``base`` that the traced function returned."""
    # torch 2.12 moved the choice from a config into an argument.
    replay = {"replay_views": True} if "replay_views" in signature(gen_alias_from_base).parameters else {}
    result: Tensor = gen_alias_from_base(base, like, alias.requires_grad, alias.view_sequence, **replay)
    return result


# What autocast computes in the lower precision, of the ops that backward formulas call; its other ops go to float32.
_LOWERED = frozenset({"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "addr", "matmul", "linear"})


def autocast_changes(target: Any, given: Sequence[torch.dtype], device: str, dtype: torch.dtype) -> bool:
    """Would autocast to ``dtype`` on a device hand other dtypes to an ATen op than the ``given`` ones?"""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return False
    if not torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), f"Autocast{device.upper()}"):
        return False
    if schema.name.removeprefix("aten::") in _LOWERED:
        return any(one in (torch.float32, torch.float16, torch.bfloat16) and one != dtype for one in given)
    mixed = len({one for one in given if one.is_floating_point}) > 1
    return mixed or torch.float16 in given or torch.bfloat16 in given


_FP32_PRECISION = (("cuda", "matmul"), ("cuda", "conv"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn"))


def numeric_settings() -> dict[str, Any]:
    """Process-wide settings on which the bits of a kernel, or the choice of one, depend."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    read = getattr(torch._C, "_get_fp32_precision_getter", None)  # since torch 2.9
    return {
        "fp32_precision": tuple(read(*where) for where in _FP32_PRECISION) if read is not None else None,
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        "torch.get_float32_matmul_precision()": _matmul_precision(),
        "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction": (
            torch._C._get_cublas_allow_fp16_reduced_precision_reduction()
        ),
        "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction": (
            torch._C._get_cublas_allow_bf16_reduced_precision_reduction()
        ),
        "torch.backends.cudnn.deterministic": cudnn.deterministic,
        "torch.backends.cudnn.enabled": cudnn.enabled,
        "torch.backends.mkldnn.enabled": torch._C._get_mkldnn_enabled(),
        "the kernels that scaled_dot_product_attention may use": (
            cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
            cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
            cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
            cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
        ),
    }


def _matmul_precision() -> str | None:
    """The older of two ways to set it; None where the newer one was used, after which torch refuses to tell."""
    try:
        precision: str = torch._C._get_float32_matmul_precision()
    except RuntimeError:
        return None
    return precision


def storage_key(tensor: Tensor) -> int:
    """Identity of the storage of a (fake or real) tensor, valid while the tensor is alive."""
    return int(tensor.untyped_storage()._cdata)


def cuda_started() -> bool:
    """Has this process a CUDA context? Asking for more would create one."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def backward_keeps_graph() -> bool:
    """Inside a backward: was it called with ``retain_graph=True``?"""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def direct(op: Callable[..., Any]) -> Callable[..., Any]:
    """Return what an ATen op calls: the same, a fifth of a microsecond sooner, for no Python stands before it."""
    return op._op if type(op) is torch._ops.OpOverload else op


class BoxedCodeGen(CodeGen):
    """Generated functions take one list and empty it, so that nobody holds an argument past its last use.

    They call ATen ops directly. A call of a Python function isn't only slower: the frame of a large network's step
    nearly fills the interpreter's 16 KB of stack, and where the next frame doesn't fit, CPython maps and unmaps a new
    chunk for every call (12 us; it made a step of a GPT take 1.7 times as long).
    """

    def __init__(self) -> None:
        super().__init__()
        self._direct: dict[str, Callable[..., Any]] = {}
        self._body_transformer = self._call_directly

    def _call_directly(self, body: list[str]) -> list[str]:
        """Let the lines of a function's body call local variables in place of ATen ops by their paths."""
        text = "\n".join(body)
        paths = dict.fromkeys(call[2] for call in _OP_CALL.finditer(text))
        names = {path: _unused(f"do_{path.replace('.', '_')}", text) for path in paths}
        self._direct = {name: direct(operator.attrgetter(path)(torch.ops)) for path, name in names.items()}
        return [_OP_CALL.sub(lambda call: f"{call[1]}{names[call[2]]}(", line) for line in body]

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [("direct_ops", tuple(self._direct.values()))]

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        names = [name.split(":")[0].split("=")[0].strip() for name in free_vars if name != "self"]
        lines = [f"def {self._func_name}(self, boxed):"]
        if names:
            lines += [f"{', '.join(names)}, = boxed", "boxed.clear()"]
        if self._direct:
            lines.append(f"{', '.join(self._direct)}, = direct_ops")
        return "\n    ".join(lines)


_OP_CALL = re.compile(r"^(\w+ = )torch\.ops\.([\w.]+)\(", re.MULTILINE)


def _unused(name: str, text: str) -> str:
    """A name that doesn't stand in a text."""
    while name in text:
        name += "_"
    return name


def is_batched(tensor: Tensor) -> bool:
    """Does it stand for many, under vmap?"""
    return "Batched" in repr(torch._C._dispatch_keys(tensor))  # two keys, one of them without a name in Python


def global_module_hooks() -> tuple[int, ...]:
    """Numbers of the hooks that run for every module of the process."""
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    return tuple(number for kind in kinds for number in getattr(nn.modules.module, f"_global_{kind}", ()))


def transform_around() -> bool:
    """Is a ``torch.func`` transform (grad, vmap, jvp) at work?"""
    return torch._C._functorch.peek_interpreter_stack() is not None


def carry_tangents(tensors: Iterable[Tensor]) -> bool:
    """Is one of them a dual tensor of forward-mode differentiation?"""
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0:
        return False
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    return any(unpack(tensor).tangent is not None for tensor in tensors)


def saving_hooks_around() -> bool:
    """Would what autograd saves now go through hooks (``saved_tensors_hooks``)?"""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


@contextlib.contextmanager
def linearized(found: Callable[[], None]) -> Iterator[None]:
    """Call ``found`` where this thread's ``torch.func.linearize`` starts to trace: within a trace that breaks autograd
    for good.
    """
    with _TRACE_LOCK:
        disallow, thread = eager_transforms.lazy_dynamo_disallow, threading.get_ident()

        def noted(function: Callable[..., Any]) -> Callable[..., Any]:
            if threading.get_ident() == thread:
                found()
            return disallow(function)

        eager_transforms.lazy_dynamo_disallow = noted  # type: ignore[assignment]
        try:
            yield
        finally:
            eager_transforms.lazy_dynamo_disallow = disallow


SET_DATA = vars(torch._C.TensorBase)["data"].__set__
GET_PLACE = tuple(vars(torch._C.TensorBase)[name].__get__ for name in ("is_leaf", "grad_fn"))
FORMATTING = (Tensor.__repr__, Tensor.__format__)
HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)
# Kinds of tensors that a forward meets in a trace only.
TRACED_KINDS = frozenset({FakeTensor, FunctionalTensor})
GET_GRAD = vars(torch._C.TensorBase)["grad"].__get__


def fake_of(tensor: Tensor) -> Tensor:
    """The fake tensor whose calls a trace records, behind one that a traced function is given."""
    if isinstance(tensor, FunctionalTensor):
        torch._functionalize_sync(tensor.elem)
        return torch._from_functional_tensor(tensor.elem)
    return tensor


def origins(tensor: Tensor) -> Set[int] | None:
    """The positions among a trace's placeholders from which a tensor is computed, -1 for a draw.

    None where no ops are recorded; an empty set for what no op made.
    """
    mode = get_proxy_mode()
    if mode is None:
        return None
    proxy = get_proxy_slot(fake_of(tensor), mode.tracer, None)
    if proxy is None:
        return frozenset()
    places = {node: at for at, node in enumerate(n for n in mode.tracer.graph.nodes if n.op == "placeholder")}
    found: set[int] = set()
    todo = [proxy.proxy.node]
    seen = {*todo}
    while todo:
        node = todo.pop()
        if node in places:
            found.add(places[node])
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            found.add(-1)
        fresh = [source for source in node.all_input_nodes if source not in seen]
        seen.update(fresh)
        todo += fresh
    return found


@contextlib.contextmanager
def own_saving_hooks(found: Callable[[], None]) -> Iterator[None]:
    """Call ``found`` when this thread enters a ``saved_tensors_hooks`` of its own.

    A trace doesn't call such hooks; torch's classes of them (``save_on_cpu``, checkpoint's) keep values as they are.
    """
    kind, thread = torch.autograd.graph.saved_tensors_hooks, threading.get_ident()
    enter = kind.__enter__

    def noted(self: Any) -> Any:
        if threading.get_ident() == thread and (type(self) is kind or not type(self).__module__.startswith("torch.")):
            found()
        return enter(self)

    kind.__enter__ = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__enter__ = enter  # type: ignore[method-assign]


getitem = operator.getitem


def training_rnn_layer(*args: Any) -> tuple[Tensor, ...]:
    """OneDNN's LSTM layer with the workspace that its backward needs.

    The op fills it only in grad mode, whatever its ``train`` argument says; below autograd nothing is recorded.
    """
    with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
        result: tuple[Tensor, ...] = torch.ops.aten.mkldnn_rnn_layer.default(*args)
    return result


class allocation_events:
    """Record this thread's CPU allocator events: on enter a callable, which after the exit gives byte changes.

    The legacy profiler starts in a tenth of a millisecond and prints nothing; Kineto's takes seconds at first.
    """

    def __enter__(self) -> Callable[[], list[int]]:
        config = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
        torch._C._autograd._enable_profiler_legacy(config)
        self._changes: list[int] = []
        return lambda: self._changes

    def __exit__(self, *exc: object) -> None:
        threads = torch._C._autograd._disable_profiler_legacy()
        self._changes.extend(
            event.cpu_memory_usage() for events in threads for event in events if str(event.kind()) == "memory_alloc"
        )


def outside_of_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile out of a function and of all that it calls; what is around it may be compiled.

    As `torch.compiler.disable` does, without loading the compiler for those who don't use it.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            set_eval_frame(before)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    return run


def min_cut_partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Torch's own partitioner, which reads ``activation_memory_budget``; loads the compiler."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    forward, backward = min_cut_rematerialization_partition(joint, inputs, **kwargs)
    return forward, backward


def backend_of_partitions(partition: Callable[..., Any]) -> Callable[..., Any]:
    """A backend for `torch.compile` that partitions and runs the two graphs as they are; loads the compiler."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    backend: Callable[..., Any] = aot_autograd(fw_compiler=boxed_nop, bw_compiler=boxed_nop, partition_fn=partition)
    return backend


@contextlib.contextmanager
def compiling_under(budget: float, *, variants: int) -> Iterator[None]:
    """Compile under torch's ``activation_memory_budget``, whole graphs, up to so many variants of one code."""
    import torch._dynamo

    with (
        functorch_config.patch(activation_memory_budget=budget),
        torch._dynamo.config.patch(
            allow_rnn=True,
            trace_autograd_ops=True,
            recompile_limit=variants,
            accumulated_recompile_limit=100 * variants,
            automatic_dynamic_shapes=False,
        ),
    ):
        yield


def forget_compiled() -> None:
    """Drop all that `torch.compile` has compiled in this process."""
    import torch._dynamo

    torch._dynamo.reset()


def returns_new_tensors(target: object) -> TypeGuard[torch._ops.OpOverload]:
    """Is a graph node's target an op that runs a kernel, rather than a view or Python?"""
    return isinstance(target, torch._ops.OpOverload) and not any(
        result.alias_info is not None for result in target._schema.returns
    )
