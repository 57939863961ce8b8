"""Training steps that are legal and unpleasant, by name; built small, or large where size is the point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rematerialize.ir import Op, TrainingGraph


def chain(
    length: int = 12, *, size: int = 8, time_s: float = 1.0, once: Callable[[int], bool] = lambda at: False
) -> TrainingGraph:
    """Return a chain of equal ops whose backward reads each activation and the gradient above it."""
    ops = [
        Op(f"f{at}", "forward", time_s, (f"a{at - 1}" if at else "x",), (f"a{at}",), recomputable=not once(at))
        for at in range(length)
    ]
    ops += [
        Op(f"b{at}", "backward", time_s, (f"a{at}", f"d{at + 1}" if at + 1 < length else "t"), (f"d{at}",))
        for at in reversed(range(length))
    ]
    sizes = {"x": size, "t": size, **{f"{kind}{at}": size for kind in "ad" for at in range(length)}}
    return TrainingGraph(tuple(ops), sizes, frozenset({"x"}), ("t",), (), ("d0",)).verify()


def step(
    ops: Sequence[Op],
    *,
    sizes: dict[str, int] | None = None,
    tangents: Sequence[str] = (),
    outputs: Sequence[str] = (),
    gradients: Sequence[str] = (),
) -> TrainingGraph:
    """Return a step whose storages have 8 bytes where nothing else is said; what nobody makes is resident."""
    names = dict.fromkeys(name for op in ops for name in (*op.inputs, *op.outputs))
    made = {name for op in ops for name in op.outputs} | {*tangents}
    return TrainingGraph(
        tuple(ops),
        dict.fromkeys((*names, *tangents), 8) | (sizes or {}),
        frozenset(name for name in names if name not in made),
        tuple(tangents),
        tuple(outputs),
        tuple(gradients),
    ).verify()


def resized(graph: TrainingGraph, size: Callable[[int], int]) -> TrainingGraph:
    """Return a graph whose sizes are a function of their position."""
    return replace(graph, storages={name: size(at) for at, name in enumerate(graph.storages)}).verify()


def varied(graph: TrainingGraph, times_s: Sequence[float]) -> TrainingGraph:
    """Return a graph whose ops take the given times in turn."""
    ops = (replace(op, time_s=times_s[at % len(times_s)]) for at, op in enumerate(graph.ops))
    return replace(graph, ops=tuple(ops)).verify()


def with_transient(length: int = 8) -> TrainingGraph:
    """Return a chain in whose middle one op needs more workspace than all storages together."""
    graph = chain(length)
    ops = tuple(replace(op, transient_bytes=10**6) if op.name == f"f{length // 2}" else op for op in graph.ops)
    return replace(graph, ops=ops).verify()


def fan(uses: int, *, backward: bool = True) -> TrainingGraph:
    """Return a step in which one activation is read by very many ops."""
    phase = "backward" if backward else "forward"
    ops = [Op("f", "forward", 1.0, ("x",), ("a",)), Op("g", "forward", 1.0, ("a",), ("c",))]
    reads = [Op(f"u{at}", phase, 1.0, ("a", f"r{at - 1}" if at else "c"), (f"r{at}",)) for at in range(uses)]
    last = Op("last", "backward", 1.0, (f"r{uses - 1}", "c"), ("w",))
    return step([*ops, *reads, last], gradients=("w",))


def multi_output(length: int = 8) -> TrainingGraph:
    """Return a chain of ops with three outputs each, read at different times."""
    ops = [
        Op(f"f{at}", "forward", 1.0, (f"a{at - 1}" if at else "x",), (f"a{at}", f"m{at}", f"z{at}"))
        for at in range(length)
    ]
    for at in reversed(range(length)):
        upstream = f"d{at + 1}" if at + 1 < length else "t"
        ops.append(Op(f"b{at}", "backward", 1.0, (upstream, f"m{at}"), (f"d{at}", f"w{at}")))
        ops.append(Op(f"c{at}", "backward", 1.0, (upstream, f"a{at}", f"w{at}"), (f"v{at}",)))
    return step(ops, tangents=("t",), gradients=("d0", *(f"v{at}" for at in range(length))))


def shared_tangents(length: int = 6) -> TrainingGraph:
    """Return a step of two tangents that several ops read; one is also a gradient, and so is a third, unread."""
    ops = [Op(f"f{at}", "forward", 1.0, (f"a{at - 1}" if at else "x",), (f"a{at}",)) for at in range(length)]
    for at in reversed(range(length)):
        upstream = (f"d{at + 1}",) if at + 1 < length else ()
        ops.append(Op(f"b{at}", "backward", 1.0, (f"a{at}", "t1", "t2", *upstream), (f"d{at}",)))
    return step(ops, tangents=("t1", "t2", "t3", "unread"), gradients=("d0", "t2", "t3"), sizes={"t2": 20})


def held_outputs(length: int = 8) -> TrainingGraph:
    """Return a chain whose outputs' inputs are dropped, so that what makes them is worth running again."""
    graph = chain(length)
    ops = list(graph.ops)
    for at in range(1, length, 2):  # f_at makes a large value beside the held one
        index = next(k for k, op in enumerate(ops) if op.name == f"f{at}")
        ops[index] = replace(ops[index], outputs=(f"a{at}", f"big{at}"))
        index = next(k for k, op in enumerate(ops) if op.name == f"b{at}")
        ops[index] = replace(ops[index], inputs=(*ops[index].inputs, f"big{at}"))
    outputs = tuple(f"a{at}" for at in range(1, length, 2))
    sizes = {"x": 8} | {f"a{at}": 2 for at in range(1, length, 2)} | {f"big{at}": 30 for at in range(1, length, 2)}
    return step(ops, sizes=sizes, tangents=("t",), outputs=outputs, gradients=("d0",))


def both_lists(length: int = 6) -> TrainingGraph:
    """Return a chain that hands out one activation as an output and as a gradient, and others as either."""
    return replace(chain(length), outputs=("a2", f"a{length - 1}"), gradients=("a2", "a1", "x", "d0")).verify()


def no_inputs(length: int = 6) -> TrainingGraph:
    """Return a step whose forward ops read nothing (random numbers, constants) and which are added up backward."""
    ops = [Op(f"f{at}", "forward", 1.0, (), (f"a{at}",)) for at in range(length)]
    for at in range(length):
        ops.append(Op(f"b{at}", "backward", 1.0, (f"a{at}", *([f"s{at - 1}"] if at else [])), (f"s{at}",)))
    return step([*ops, Op("free", "backward", 1.0, (), ("w",))], gradients=(f"s{length - 1}", "w"))


def no_outputs(length: int = 6) -> TrainingGraph:
    """Return a chain with backward ops that write nothing (in-place updates of what is resident)."""
    graph = chain(length)
    extra = [Op(f"e{at}", "backward", 1.0, (f"a{at}", f"d{at}"), ()) for at in range(length)]
    ops = (*graph.ops, *extra, Op("nothing", "backward", 1.0, (), ()), Op("dead", "backward", 2.0, ("x",), ("y",)))
    return replace(graph, ops=ops, storages={**graph.storages, "y": 50}).verify()


def unneeded(length: int = 4) -> TrainingGraph:
    """Return a step none of whose forward ops is needed."""
    graph = chain(length)
    backward = [Op("b0", "backward", 1.0, ("t",), ("g",)), Op("b1", "backward", 1.0, ("g", "x"), ("h",))]
    ops = (*(op for op in graph.ops if op.phase == "forward"), *backward)
    return TrainingGraph(ops, {**graph.storages, "g": 3, "h": 4}, frozenset({"x"}), ("t",), (), ("h",)).verify()


def forward_only(length: int = 5) -> TrainingGraph:
    """Return a step without a backward: outputs, gradients and tangents all the same."""
    ops = [Op(f"f{at}", "forward", 1.0, (f"a{at - 1}" if at else "x",), (f"a{at}",), 2) for at in range(length)]
    return step(ops, tangents=("t",), outputs=(f"a{length - 1}", "a1"), gradients=("a2", "t", "x"))


def empty(**groups: tuple[str, ...]) -> TrainingGraph:
    """Return a step without ops."""
    names = [name for group in groups.values() for name in group]
    return TrainingGraph(
        (), dict.fromkeys(names, 8), frozenset(), groups.get("tangents", ()), (), groups.get("gradients", ())
    ).verify()


SMALL: dict[str, Callable[[], TrainingGraph]] = {
    "zero-byte storages": lambda: chain(size=0),
    "every second storage of no bytes": lambda: resized(chain(), lambda at: 7 * (at % 2)),
    "zero costs": lambda: chain(time_s=0.0),
    "nothing costs anything": lambda: chain(size=0, time_s=0.0),
    "costs of every magnitude": lambda: varied(chain(), (1e-300, 1e290, 1.0, 1e16, 3e-9)),
    "costs so small that they are subnormal": lambda: chain(time_s=5e-324),
    "one forward op": lambda: step([Op("f", "forward", 1.0, ("x",), ("a",), 3)], outputs=("a",)),
    "one backward op": lambda: step([Op("b", "backward", 1.0, ("x",), ("g",), 3)], gradients=("g",)),
    "no forward op": lambda: step(
        [Op("b0", "backward", 1.0, ("t",), ("g",)), Op("b1", "backward", 1.0, ("g",), ("h",))],
        tangents=("t",),
        gradients=("h",),
    ),
    "forward ops none of which is needed": unneeded,
    "forward ops only": forward_only,
    "one dead forward op": lambda: step([Op("f", "forward", 1.0, ("x",), ("a",), 3)]),
    "several outputs": multi_output,
    "nothing recomputable": lambda: chain(once=lambda at: True),
    "every second op not recomputable": lambda: chain(once=lambda at: at % 2 == 0),
    "every second op not recomputable, others": lambda: chain(once=lambda at: at % 2 == 1),
    "shared tangents, and tangents that are gradients": shared_tangents,
    "a value that is output and gradient": both_lists,
    "outputs and gradients from the middle": held_outputs,
    "a transient larger than all else": with_transient,
    "sizes above 2^53": lambda: resized(chain(), lambda at: 2**53 + 1 + at),
    "sizes above 2^62": lambda: resized(chain(), lambda at: 2**62 + 3 * at + 1),
    "sizes above 2^64": lambda: resized(chain(), lambda at: 2**70 + 3 * at + 1),
    "sizes no float holds": lambda: resized(chain(), lambda at: 10**400 + 3 * at + 1),
    "one byte beside 2^62": lambda: resized(chain(), lambda at: 2**62 if at % 5 == 0 else 1),
    "ops without inputs": no_inputs,
    "backward ops without outputs": no_outputs,
    "no ops": empty,
    "no ops but a tangent to hand on": lambda: empty(tangents=("t",), gradients=("t",)),
    "one value read often": lambda: fan(40),
    "one value read often in the forward": lambda: fan(40, backward=False),
}
