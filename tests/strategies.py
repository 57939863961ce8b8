"""Hypothesis strategies: small training graphs of every shape that the format allows."""

from __future__ import annotations

from hypothesis import strategies as st

from rematerialize.ir import Op, TrainingGraph


@st.composite
def training_graphs(draw: st.DrawFn, max_forward: int = 8, max_backward: int = 6) -> TrainingGraph:
    """Random steps: multiple outputs, zero sizes and times, dead ops, ops that run once, tangents."""
    sizes = {"p": 64, "t": draw(st.integers(0, 9))}
    made: list[str] = []
    forward: list[str] = []
    ops: list[Op] = []
    counts = draw(st.integers(1, max_forward)), draw(st.integers(1, max_backward))
    for phase, count in zip(("forward", "backward"), counts, strict=True):
        for index in range(count):
            name = f"{phase[0]}{index}"
            pool = ["p", *made] if phase == "forward" else ["p", "t", *made]
            reads = draw(st.lists(st.sampled_from(pool), max_size=3, unique=True))
            writes = [f"{name}.{k}" for k in range(draw(st.integers(1, 2)))]
            sizes |= {write: draw(st.integers(0, 9)) for write in writes}
            ops.append(
                Op(
                    name,
                    phase,  # type: ignore[arg-type]
                    float(draw(st.integers(0, 4))),
                    tuple(reads),
                    tuple(writes),
                    draw(st.sampled_from((0, 0, 3))),
                    draw(st.sampled_from((True, True, True, False))) if phase == "forward" else True,
                )
            )
            made += writes
        if phase == "forward":
            forward = list(made)
    outputs = draw(st.lists(st.sampled_from(forward), max_size=2, unique=True))
    gradients = draw(st.lists(st.sampled_from([*made, "p", "t"]), max_size=3, unique=True))
    return TrainingGraph(tuple(ops), sizes, frozenset({"p"}), ("t",), tuple(outputs), tuple(gradients)).verify()


@st.composite
def chains(draw: st.DrawFn, max_length: int = 5) -> TrainingGraph:
    """Chains x1 -> ... -> xL of unequal sizes and times whose backward reads input and gradient."""
    length = draw(st.integers(2, max_length))
    sizes = {"x0": 8, **{f"x{i}": draw(st.integers(1, 6)) for i in range(1, length + 1)}}
    ops = [
        Op(f"f{i}", "forward", float(draw(st.integers(1, 4))), (f"x{i - 1}",), (f"x{i}",)) for i in range(1, length + 1)
    ]
    for i in range(length, 0, -1):
        sizes[f"d{i}"] = sizes[f"x{i}"]
        if i > 1:
            sizes[f"d{i - 1}"] = sizes[f"x{i - 1}"]
        sizes["d0"] = 1
        reads = (f"d{i}", f"x{i - 1}")
        ops.append(Op(f"b{i}", "backward", float(draw(st.integers(1, 4))), reads, (f"d{i - 1}",)))
    return TrainingGraph(tuple(ops), sizes, frozenset({"x0"}), (f"d{length}",), (), ("d0",)).verify()


def budgets(low: int, high: int, count: int = 5) -> list[int]:
    """Return evenly spaced budgets from low to high, both included."""
    return sorted({low + (high - low) * k // (count - 1) for k in range(count)})
