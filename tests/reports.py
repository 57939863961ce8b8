"""Steps by hand for the tests of the reports: small enough to know every figure."""

from __future__ import annotations

from rematerialize.ir import Op, TrainingGraph
from rematerialize.schedule import Schedule
from rematerialize.simulate import simulate

LAYERS = 4


def a_step(layers: int = LAYERS, prefix: str = "net.layers") -> TrainingGraph:
    """Return a chain of layers of 1,000 bytes and 1 s; its backward takes 2 s per layer, the last with a workspace."""
    ops = []
    for at in range(layers):
        where = {"source": f"model.py:{10 + at}", "module": f"{prefix}.{at}", "target": "aten.relu.default"}
        ops.append(Op(f"f{at}", "forward", 1.0, (f"a{at - 1}" if at else "x",), (f"a{at}",), **where))
    for at in reversed(range(layers)):
        incoming = f"d{at + 1}" if at + 1 < layers else "dy"
        where = {"source": f"model.py:{10 + at}", "module": f"{prefix}.{at}", "target": "aten.relu_backward"}
        workspace = 500 if at == 0 else 0
        ops.append(Op(f"b{at}", "backward", 2.0, (f"a{at}", incoming), (f"d{at}",), workspace, **where))
    sizes = {"x": 1000, "dy": 1000} | {f"{kind}{at}": 1000 for kind in "ad" for at in range(layers)}
    labels = {"a0": "net.layers.0 output float32[250]"}
    last = f"a{layers - 1}"
    return TrainingGraph(tuple(ops), sizes, frozenset({"x"}), ("dy",), (last,), ("d0",), labels).verify()


def a_schedule(graph: TrainingGraph) -> Schedule:
    """Return the schedule that stores the last activation only and recomputes the others for each backward op."""
    layers = sum(op.phase == "forward" for op in graph.ops)
    forward = tuple(f"f{at}" for at in range(layers))
    backward: list[str] = []
    for at in reversed(range(layers)):
        backward += [*(f"f{below}" for below in range(at + 1) if at + 1 < layers), f"b{at}"]
    result = simulate(graph, forward, backward)
    budget_bytes = result.peak_bytes + 100
    return Schedule(forward, tuple(backward), budget_bytes, "by hand", result.peak_bytes, result.time_s, 4000)


def store_all_schedule(graph: TrainingGraph) -> Schedule:
    """Return the schedule that runs every op once, in the graph's order."""
    forward = tuple(op.name for op in graph.ops if op.phase == "forward")
    backward = tuple(op.name for op in graph.ops if op.phase == "backward")
    result = simulate(graph, forward, backward)
    return Schedule(forward, backward, result.peak_bytes, "store_all", result.peak_bytes, result.time_s, 0)


def a_long_step(count: int, time_s: float = 1e-4) -> TrainingGraph:
    """Return a step of so many ops, an even number, of sizes that differ, in modules of layers."""
    layers = count // 2
    ops, sizes = [], {"x": 64, "dy": 64}
    for at in range(layers):
        sizes |= {f"a{at}": 1000 + at * 37 % 911, f"d{at}": 900 + at * 53 % 701}
        where = {"source": f"model.py:{at % 40}", "module": f"layers.{at // 40}.{'ab'[at % 2]}"}
        ops.append(Op(f"f{at}", "forward", time_s, (f"a{at - 1}" if at else "x",), (f"a{at}",), **where))
    for at in reversed(range(layers)):
        reads = (f"a{at}", f"d{at + 1}" if at + 1 < layers else "dy")
        ops.append(Op(f"b{at}", "backward", time_s, reads, (f"d{at}",)))
    return TrainingGraph(tuple(ops), sizes, frozenset({"x"}), ("dy",), (), ("d0",)).verify()
