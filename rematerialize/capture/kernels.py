"""Group a normalized graph into kernels: what the planner moves as one op.

A kernel is one ATen call, followed by calls that write over its result where nobody else reads it (dropout's
mask, ReLU after batch norm, gradient accumulation): eager's own in-place economy, which functionalization lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from rematerialize import torch_private as private
from rematerialize.capture.aliasing import (
    Aliases,
    find_aliases,
    is_random,
    is_view,
    phase_of,
    tensors_of,
)
from rematerialize.capture.generators import generator_of
from rematerialize.capture.inplace import InPlaceForm, fits_over, in_place_forms
from rematerialize.capture.normalize import NormalGraph
from rematerialize.capture.scatter import reads_elsewhere


@dataclass(slots=True)
class Kernel:
    """One schedulable op.

    Attributes
    ----------
    name : str
    phase : str
        "forward" or "backward".
    calls : list of (node, form)
        In order; ``form`` is None for the allocating call and says how each later call writes in place.
    reads, writes : list of str
        Storage names, zero-byte ordering tokens among them.
    once : bool
        Must not be recomputed.
    random : bool
        Draws from a generator.
    rng : str
        Storage of the saved generator state (random kernels).
    rng_device : str
        Device of the generator that it draws from, "" for kernels that don't.
    generator : Node, optional
        That generator, None for the device's default one.
    """

    name: str
    phase: str
    calls: list[tuple[fx.Node, InPlaceForm | None]]
    reads: list[str]
    writes: list[str]
    once: bool = False
    random: bool = False
    rng: str = ""
    rng_device: str = ""
    generator: fx.Node | None = None

    @property
    def head(self) -> fx.Node:
        return self.calls[0][0]

    @property
    def last(self) -> fx.Node:
        return self.calls[-1][0]


@dataclass(slots=True)
class KernelGraph:
    """Kernels in executable order, and what their storages are.

    Attributes
    ----------
    storage_of : dict
        Node to the storages that its value looks at, in-place merging included.
    size_bytes : dict
        Storage name to bytes (tokens 0).
    makers : dict
        Node to the kernel that computes it, items of multi-output calls included; views are not in it.
    tokens_out : list of str
        Storages that stand for effects (zero bytes) or for what autograd holds: produced in the forward, kept.
    """

    normal: NormalGraph
    kernels: list[Kernel]
    storage_of: dict[fx.Node, tuple[str, ...]]
    size_bytes: dict[str, int]
    tokens_out: list[str] = field(default_factory=list)
    makers: dict[fx.Node, Kernel] = field(default_factory=dict)

    def storages(self, nodes: list[fx.Node]) -> list[str]:
        """Distinct storages that the nodes look at, in order."""
        return list(dict.fromkeys(name for node in nodes for name in self.storage_of[node]))


# The tangent of a scalar loss, which the engine holds to the end of the backward, and the loss outside the model.
_AUTOGRAD_BYTES = 64
_RNG_STATE_BYTES = {"cpu": 5056, "cuda": 16}


def group_kernels(normal: NormalGraph) -> KernelGraph:
    """Split a normalized graph into kernels, merge in-place followers, add ordering tokens."""
    aliases = find_aliases(normal.joint.graph)
    builder = _Builder(normal, aliases)
    builder.split()
    builder.merge_followers()
    builder.accumulate_in_place()
    builder.order_effects()
    builder.order_random()
    builder.count_autograd()
    graph = builder.graph
    for kernel in graph.kernels:
        for node, _ in kernel.calls:
            graph.makers[node] = kernel
            if not isinstance(node.meta["val"], Tensor):
                graph.makers.update({user: kernel for user in node.users if user.target is private.getitem})
    return graph


class _Builder:
    def __init__(self, normal: NormalGraph, aliases: Aliases) -> None:
        self.normal = normal
        self.aliases = aliases
        self.graph = KernelGraph(normal, [], dict(aliases.of), dict(aliases.size_bytes))
        self.nodes_of: dict[str, list[fx.Node]] = {}
        for node, names in aliases.of.items():
            for name in names:
                self.nodes_of.setdefault(name, []).append(node)
        self.kept = set(
            self.graph.storages(
                [n for n in (*normal.joint.outputs, *normal.joint.gradients, *normal.joint.primals) if n]
            )
        )
        # Batch norms are left out: they recompute by their stateless form.
        self.updates = frozenset(node for node in normal.effects if not _is_norm(node))
        self.producer: dict[str, Kernel] = {}
        self.readers: dict[str, list[Kernel]] = {}
        self.index: dict[str, int] = {}

    def split(self) -> None:
        """One kernel per allocating or effectful call."""
        for node in self.normal.joint.graph.nodes:
            if node.op != "call_function" or is_view(node, self.aliases):
                continue
            kernel = Kernel(
                name=node.name,
                phase=phase_of(node),
                calls=[(node, None)],
                reads=self.graph.storages(node.all_input_nodes),
                writes=[name for _, name in self.aliases.created[node]],
                once=node.meta.get("once", False) or _must_save(node) or node in self.updates,
                random=is_random(node),
            )
            self.index[kernel.name] = len(self.graph.kernels)
            self.graph.kernels.append(kernel)
            for name in kernel.writes:
                self.producer[name] = kernel
            for name in kernel.reads:
                self.readers.setdefault(name, []).append(kernel)

    def merge_followers(self) -> None:
        """A call that alone reads a fresh storage writes over it, as part of the kernel that made it."""
        for position, kernel in enumerate(self.graph.kernels):
            for form in in_place_forms(kernel.head) if len(kernel.calls) == 1 else ():
                name = self._whole_argument(kernel, form)
                maker = self.producer.get(name)
                if not name or maker is None or self.readers[name] != [kernel] or kernel.head in self.updates:
                    continue
                if maker.phase != kernel.phase or maker.head in self.updates or name in self.kept:
                    continue
                if any(read != name and read in maker.writes for read in kernel.reads):
                    continue  # the sum of two results of one op: it would wait for itself
                ready = self._inputs_ready(maker, kernel, name)
                if self._can_join(maker, kernel, position, ready):
                    self._join(maker, kernel, form, name, position, ready)
                    break

    def _whole_argument(self, kernel: Kernel, form: InPlaceForm) -> str:
        """The storage that ``form`` would write over, if it can; "" otherwise."""
        node = kernel.head
        argument = node.args[form.position] if form.position < len(node.args) else None
        if not isinstance(argument, fx.Node) or len(self.graph.storage_of[argument]) != 1:
            return ""
        name = self.graph.storage_of[argument][0]
        if not fits_over(node, form, self.graph.size_bytes[name]):
            return ""
        others = [other for other in node.all_input_nodes if other is not argument]
        if any(name in self.graph.storage_of[other] for other in others) and not reads_elsewhere(node):
            return ""
        values = [value for value in (*node.args, *node.kwargs.values()) if value is argument]
        return name if len(values) == 1 else ""

    def _inputs_ready(self, maker: Kernel, kernel: Kernel, name: str) -> bool:
        """Are the follower's inputs other than ``name`` made before its maker runs?"""
        at = self.index[maker.name]
        return all(
            read == name or read not in self.producer or self.index[self.producer[read].name] < at
            for read in kernel.reads
        )

    def _can_join(self, maker: Kernel, kernel: Kernel, position: int, ready: bool) -> bool:
        """The follower moves up to its maker if its other inputs are ready there, else only from next door."""
        at = self.index[maker.name]
        adjacent = all(self.graph.kernels[i] is None for i in range(at + 1, position))
        if kernel.random and any(k is not None and k.random for k in self.graph.kernels[at + 1 : position]):
            return False
        if kernel.random and maker.random and _value(_generator(maker)) is not _value(_generator(kernel)):
            return False
        return ready or (adjacent and not maker.random)

    def _join(self, maker: Kernel, kernel: Kernel, form: InPlaceForm, name: str, position: int, ready: bool) -> None:
        at = self.index[maker.name]
        others = [read for read in kernel.reads if read != name]
        maker.calls.append((kernel.head, form))
        maker.random = maker.random or kernel.random
        maker.once = maker.once or kernel.once
        for read in others:
            self.readers[read] = [maker if reader is kernel else reader for reader in self.readers[read]]
            if read not in maker.reads:
                maker.reads.append(read)
        (result,) = kernel.writes
        self._rename(result, name, maker)
        self.graph.kernels[position] = None  # type: ignore[call-overload]
        if not ready:
            self.graph.kernels[at] = None  # type: ignore[call-overload]
            self.graph.kernels[position] = maker
            self.index[maker.name] = position

    def _rename(self, result: str, name: str, maker: Kernel) -> None:
        """What was ``result`` is ``name`` now: the same bytes, written over."""
        self.readers[name] = self.readers.pop(result, [])
        for reader in self.readers[name]:
            reader.reads = [name if read == result else read for read in reader.reads]
        for node in self.nodes_of.pop(result):
            names = self.graph.storage_of[node]
            self.graph.storage_of[node] = tuple(name if n == result else n for n in names)
            self.nodes_of[name].append(node)
        del self.graph.size_bytes[result]
        self.producer.pop(result)
        self.producer[name] = maker
        if result in self.kept:
            self.kept.add(name)

    def accumulate_in_place(self) -> None:
        """The last reader of a backward value may write over it; tokens keep the other readers before it.

        Sound because a backward op runs exactly once: the value has one instance and a known last reader.
        """
        for position, kernel in enumerate(self.graph.kernels):
            if kernel is None or kernel.phase != "backward" or len(kernel.writes) != 1:
                continue
            if len(kernel.calls) != 1:
                continue
            for form in in_place_forms(kernel.head):
                name = self._whole_argument(kernel, form)
                maker = self.producer.get(name)
                if not name or maker is None or maker.phase != "backward" or name in self.kept:
                    continue
                others = [reader for reader in self.readers[name] if reader is not kernel]
                if any(self.index[reader.name] > position for reader in others):
                    continue
                self._write_over(kernel, form, name, others)
                break

    def _write_over(self, kernel: Kernel, form: InPlaceForm, name: str, others: list[Kernel]) -> None:
        kernel.calls = [(kernel.head, form)]
        for reader in others:
            self._token(f"{reader.name}.read", reader, kernel)
        (result,) = kernel.writes
        done = f"{kernel.name}.done"
        self.graph.size_bytes[done] = 0
        later = self.readers.get(result, [])
        self._rename(result, name, kernel)
        kernel.writes = [done]
        for reader in later:
            reader.reads.append(done)

    def _token(self, token: str, before: Kernel, after: Kernel) -> None:
        self.graph.size_bytes[token] = 0
        if token not in before.writes:
            before.writes.append(token)
        if token not in after.reads:
            after.reads.append(token)

    def order_effects(self) -> None:
        """Buffer updates run once, in the forward, after every op that reads the old value."""
        by_head = {node: kernel for kernel in self.graph.kernels if kernel for node, _ in kernel.calls}
        for effect, primals in self.normal.written.items():
            kernel = by_head[effect]
            done = f"{kernel.name}.done"
            self.graph.size_bytes[done] = 0
            kernel.writes.append(done)
            self.graph.tokens_out.append(done)
            for primal in primals:
                for reader in self.readers.get(self.graph.storage_of[primal][0], []):
                    if reader is kernel or reader.phase == "backward":
                        continue
                    reader.once = True
                    self._token(f"{reader.name}.read", reader, kernel)

    def order_random(self) -> None:
        """Random ops draw in the forward in eager's order, each with its generator state at hand."""
        previous = ""
        ordered: list[Kernel] = []
        for kernel in self.graph.kernels:
            if kernel is None:
                continue
            if kernel.random and kernel.phase == "forward":
                device = tensors_of(kernel.last.meta["val"])[0][1].device
                state, drawn = f"{kernel.name}.rng", f"{kernel.name}.drawn"
                self.graph.size_bytes[state] = _RNG_STATE_BYTES.get(device.type, 16)
                self.graph.size_bytes[drawn] = 0
                after = [previous] if previous else []
                own = _generator(kernel)
                saver = Kernel(state, "forward", [], after, [state], once=True, rng_device=str(device), generator=own)
                ordered.append(saver)
                kernel.rng_device, kernel.generator = str(device), own
                kernel.reads.append(state)
                kernel.writes.append(drawn)
                kernel.rng = state
                previous = drawn
            ordered.append(kernel)
        if previous:
            self.graph.tokens_out.append(previous)
        self.graph.kernels = ordered

    def count_autograd(self) -> None:
        """What autograd itself holds during a step (the loss's own tangent) is part of the peak."""
        held = "autograd"
        self.graph.size_bytes[held] = _AUTOGRAD_BYTES
        self.graph.tokens_out.append(held)
        self.graph.kernels.insert(0, Kernel(held, "forward", [], [], [held], once=True))


def _generator(kernel: Kernel) -> fx.Node | None:
    """The generator that a random kernel was given, None for the default one."""
    given = [generator_of(node) for node, _ in kernel.calls if is_random(node)]
    return given[0] if given else None


def _value(node: fx.Node | None) -> object:
    return None if node is None else node.meta["val"]


def _is_norm(node: fx.Node) -> bool:
    """Batch norms recompute by their stateless form, so their update doesn't forbid recomputation."""
    return "_native_batch_norm_legit" in str(node.target)


def _must_save(node: fx.Node) -> bool:
    """Did a policy of selective activation checkpointing in the model ask for it?"""
    return node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE
