"""Synthetic training steps for judging solvers without torch: shapes of real nets, invented sizes.

`Tape` records forward ops and writes the backward as autograd would: in reverse, gradients of a
value used twice are summed as they arrive, weight gradients are never freed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rematerialize.ir import Op, TrainingGraph


@dataclass
class _Record:
    name: str
    reads: tuple[str, ...]
    output: str
    saves: tuple[str, ...]
    seconds: float
    weight: int
    transient: int


@dataclass
class Tape:
    """Forward ops in order; `graph` appends the backward."""

    sizes: dict[str, int] = field(default_factory=dict)
    records: list[_Record] = field(default_factory=list)
    resident: set[str] = field(default_factory=set)

    def input(self, name: str, size: int) -> str:
        self.sizes[name] = size
        self.resident.add(name)
        return name

    def op(
        self,
        reads: Sequence[str],
        size: int,
        seconds: float,
        saves: str = "io",
        weight: int = 0,
        transient: int = 0,
        extra: int = 0,
    ) -> str:
        """Record one op: the backward reads its inputs ("i"), its output ("o"), an extra save ("x")."""
        name = f"op{len(self.records)}"
        saved = [*reads] * ("i" in saves) + [name] * ("o" in saves)
        if extra:
            self.sizes[f"{name}.x"] = extra
            saved.append(f"{name}.x")
        self.sizes[name] = size
        self.records.append(_Record(name, tuple(reads), name, tuple(saved), seconds, weight, transient))
        return name

    def graph(self, loss: str) -> TrainingGraph:
        """Return the training step of a loss."""
        sizes, ops = dict(self.sizes), []
        for record in self.records:
            outputs = (record.output, *([f"{record.name}.x"] if f"{record.name}.x" in sizes else []))
            ops.append(Op(record.name, "forward", record.seconds, record.reads, outputs, record.transient))
        sizes["dloss"] = sizes[loss]
        grad = {loss: "dloss"}
        gradients: list[str] = []
        for record in reversed(self.records):
            if record.output not in grad:
                continue
            upstream = grad[record.output]
            for read in dict.fromkeys(record.reads):
                if read in self.resident:
                    continue
                new = f"d{record.name}.{read}"
                sizes[new] = sizes[read]
                seconds = record.seconds * (1.0 if record.weight else 1.2)
                inputs = (upstream, *record.saves)
                ops.append(Op(new, "backward", seconds, inputs, (new,), record.transient))
                if read in grad:
                    total = f"{new}.sum"
                    sizes[total] = sizes[read]
                    reads = (grad[read], new)
                    ops.append(Op(total, "backward", sizes[read] * 1.5e-10, reads, (total,)))
                    new = total
                grad[read] = new
            if record.weight:
                made = f"w{record.name}"
                sizes[made] = record.weight
                gradients.append(made)
                inputs = (upstream, *record.saves)
                ops.append(Op(made, "backward", record.seconds, inputs, (made,), record.transient))
        return TrainingGraph(
            tuple(ops), sizes, frozenset(self.resident), ("dloss",), (loss,), tuple(gradients)
        ).verify()


def gpt(layers: int = 2, tokens: int = 1024, width: int = 128, heads: int = 4) -> TrainingGraph:
    """Pre-norm transformer, attention matrices materialized, decomposed ops."""
    tape, unit = Tape(), tokens * width * 4
    scores = heads * tokens * 256 * 4
    move, flop = 1e-10, 2e-11

    def linear(x: str, scale_in: float, scale_out: float) -> str:
        work = tokens * width * width * scale_in * scale_out
        grad = int(width * width * scale_in * scale_out * 4)
        return tape.op([x], int(unit * scale_out), work * flop, "i", grad)

    def norm(x: str) -> str:
        return tape.op([x], unit, unit * 3 * move, "i", width * 8, extra=tokens * 8)

    x = tape.op([tape.input("ids", tokens * 8)], unit, unit * move, "i", 1000 * width * 4)
    for _ in range(layers):
        y = norm(x)
        q, k, v = (linear(y, 1, 1) for _ in range(3))
        s = tape.op([q, k], scores, scores * width / heads * flop, "i")
        s = tape.op([s], scores, scores * 2 * move, "")
        p = tape.op([s], scores, scores * 3 * move, "o")
        d = tape.op([p], scores, scores * 2 * move, "", extra=scores // 4)
        a = tape.op([d, v], unit, scores * width / heads * flop, "i")
        x = tape.op([x, linear(a, 1, 1)], unit, unit * 3 * move, "")
        y = norm(x)
        h = linear(y, 1, 4)
        g = tape.op([h], unit * 4, unit * 8 * move, "i")
        x = tape.op([x, linear(g, 4, 1)], unit, unit * 3 * move, "")
    y = linear(norm(x), 1, 1000 / width)
    p = tape.op([y], int(unit * 1000 / width), unit * 24 * move, "o")
    return tape.graph(tape.op([p], 4, 1e-6, "i"))


def _conv(tape: Tape, x: str, pixels: int, cin: int, cout: int, taps: int = 9) -> str:
    """Convolution, batch norm, relu."""
    size = pixels * cout * 4
    y = tape.op([x], size, pixels * cin * cout * taps * 2e-11, "i", cin * cout * taps * 4, size // 4)
    y = tape.op([y], size, size * 3e-10, "i", cout * 8, extra=cout * 8)
    return tape.op([y], size, size * 2e-10, "o")


def unet(depth: int = 4, pixels: int = 65536, channels: int = 16) -> TrainingGraph:
    """Encoder-decoder with a long skip per level, joined by concatenation."""
    tape = Tape()
    x, skips, width, cin = tape.input("image", pixels * 12), [], channels, 3
    for level in range(depth):
        here = pixels // 4**level
        x = _conv(tape, _conv(tape, x, here, cin, width), here, width, width)
        skips.append((x, here, width))
        x = tape.op([x], here * width, here * width * 5e-10, "i", extra=here * width * 2)
        cin, width = width, width * 2
    here = pixels // 4**depth
    x = _conv(tape, _conv(tape, x, here, cin, width), here, width, width)
    for skip, here, cout in reversed(skips):
        x = tape.op([x], here * width * 4, here * width * 1e-9, "")
        x = tape.op([skip, x], here * (cout + width) * 4, here * (cout + width) * 1e-9, "")
        x = _conv(tape, _conv(tape, x, here, cout + width, cout), here, cout, cout)
        width = cout
    x = tape.op([x], pixels * 8, pixels * width * 4e-11, "i", width * 8)
    return tape.graph(tape.op([x], 4, pixels * 1e-9, "i"))


def resnet(blocks: Sequence[int] = (3, 4, 6, 3), pixels: int = 16384, channels: int = 16) -> TrainingGraph:
    """Bottleneck residual blocks."""
    tape = Tape()
    x, cin = _conv(tape, tape.input("image", pixels * 12), pixels, 3, channels, 49), channels
    for stage, count in enumerate(blocks):
        here, width = pixels // 4**stage, channels * 2**stage
        for block in range(count):
            y = _conv(tape, x, here, cin, width, 1)
            y = _conv(tape, y, here, width, width)
            y = _conv(tape, y, here, width, width * 4, 1)
            short = x if block else _conv(tape, x, here, cin, width * 4, 1)
            size, cin = here * width * 16, width * 4
            x = tape.op([y, short], size, size * 3e-10, "o")
    x = tape.op([x], cin * 4, size * 1e-10, "i", cin * 4000)
    return tape.graph(tape.op([x], 4, 1e-6, "i"))


def densenet(blocks: Sequence[int] = (6, 12, 24, 16), pixels: int = 4096, growth: int = 16) -> TrainingGraph:
    """Dense blocks: every layer reads the concatenation of all before it."""
    tape = Tape()
    x, width = _conv(tape, tape.input("image", pixels * 12), pixels, 3, 2 * growth, 49), 2 * growth
    for stage, count in enumerate(blocks):
        here, parts = pixels // 4**stage, [x]
        for _ in range(count):
            y = tape.op(parts, here * width * 4, here * width * 8e-10, "") if len(parts) > 1 else x
            y = _conv(tape, _conv(tape, y, here, width, 4 * growth, 1), here, 4 * growth, growth)
            parts.append(y)
            width += growth
        x = tape.op(parts, here * width * 4, here * width * 8e-10, "")
        x = _conv(tape, x, here, width, width // 2, 1)
        width //= 2
        x = tape.op([x], here * width, here * width * 1e-9, "")
    return tape.graph(tape.op([x], 4, 1e-6, "i"))


def lstm(steps: int = 200, batch: int = 32, width: int = 128) -> TrainingGraph:
    """Unrolled LSTM cell: 13 ops a step, one weight gradient per step (summed by the caller)."""
    tape, unit = Tape(), batch * width * 4
    h = tape.op([tape.input("h0", unit)], unit, 1e-6, "")
    c = tape.op([tape.input("c0", unit)], unit, 1e-6, "")
    move, flop = 2e-10 * unit, batch * width * width * 4 * 2e-11
    for _ in range(steps):
        gates = tape.op([h], 4 * unit, flop, "i", 64)
        parts = [tape.op([gates], unit, move, "") for _ in range(4)]
        i, f, g, o = (tape.op([p], unit, move * 2, "o") for p in parts)
        c = tape.op([tape.op([f, c], unit, move, "i"), tape.op([i, g], unit, move, "i")], unit, move, "")
        h = tape.op([o, tape.op([c], unit, move * 2, "o")], unit, move, "i")
    return tape.graph(tape.op([h], 4, 1e-6, "i"))


def towers(count: int = 3, depth: int = 10, unit: int = 1 << 20) -> TrainingGraph:
    """Independent towers of unequal widths joined by one head."""
    tape, ends = Tape(), []
    for tower in range(count):
        x = tape.input(f"x{tower}", unit)
        for level in range(depth):
            size = unit * (tower + 1) >> (level // 4)
            x = tape.op([x], size, size * 2e-9, "i", size // 16)
            x = tape.op([x], size, size * 2e-10, "o")
        ends.append(x)
    x = tape.op(ends, unit, unit * 1e-9, "i", unit // 16)
    return tape.graph(tape.op([x], 4, 1e-6, "i"))


def chain(length: int = 50, size: int = 1 << 20, uneven: bool = False) -> TrainingGraph:
    """Chain of linear ops; ``uneven`` varies sizes and times in a fixed pattern."""
    tape = Tape()
    x = tape.input("x", size)
    for level in range(length):
        scale = 1 + (level * 7 % 5) if uneven else 1
        x = tape.op([x], size * scale, 1e-3 * (1 + level * 3 % 4 if uneven else 1), "i", 64)
    return tape.graph(tape.op([x], 4, 1e-6, "i"))


def random_dag(
    nodes: int = 400, seed: int = 0, far: float = 0.15, join: float = 0.3, unit: int = 1 << 20
) -> TrainingGraph:
    """Seeded random network: ops of varied sizes and costs, recent inputs, some joins, some skips from far back.

    Parameters
    ----------
    nodes : int
        Forward ops before those that gather the loose ends; the step has about three times as many.
    seed : int
    far : float
        Probability that an input is drawn from all earlier values rather than from the last four.
    join : float
        Probability that an op reads two values; half as often it reads three.
    unit : int
        Typical size of a value in bytes; sizes vary from an eighth of it to four times as much.
    """
    draw, tape = random.Random(seed), Tape()
    values = [tape.input("x", unit)]
    loose: dict[str, None] = {}
    for _ in range(nodes):
        wanted = 1 + sum(draw.random() < chance for chance in (join, join / 2))
        reads = {values[-1]: None} if draw.random() < 0.8 else {}
        for _ in range(wanted - len(reads)):
            low = 0 if draw.random() < far else max(0, len(values) - 4)
            reads[values[draw.randrange(low, len(values))]] = None
        size = int(unit * 2 ** draw.uniform(-3, 2))
        moved = size + sum(tape.sizes[read] for read in reads)
        heavy = draw.random() < 0.5
        seconds = moved * 1e-10 * (draw.uniform(2, 12) if heavy else 1)
        saves = "i" if heavy else draw.choice(("i", "o", ""))
        weight = size // 16 if heavy else 0
        transient = moved // 4 if heavy and draw.random() < 0.2 else 0
        extra = size // 4 if draw.random() < 0.1 else 0
        made = tape.op(list(reads), size, seconds, saves, weight, transient, extra)
        for read in reads:
            loose.pop(read, None)
        loose[made] = None
        values.append(made)
    ends = list(loose)
    while len(ends) > 1:
        group, ends = ends[:8], ends[8:]
        ends.append(tape.op(group, 4, 1e-6, "i"))
    return tape.graph(ends[0] if ends != values[-1:] else tape.op(ends, 4, 1e-6, "i"))


# Builders of steps with about a given number of ops, for measuring how a solver scales.
SHAPES: dict[str, Callable[[int], TrainingGraph]] = {
    "chain": lambda ops: chain(ops // 3, uneven=True),
    "lstm": lambda ops: lstm(ops // 33),
    "gpt": lambda ops: gpt(ops // 49),
    "random": lambda ops: random_dag(ops * 2 // 7),
}

SUITE: dict[str, Callable[[], TrainingGraph]] = {
    "gpt-2": lambda: gpt(2),
    "gpt-12": lambda: gpt(12),
    "unet": unet,
    "resnet-50": resnet,
    "densenet-121": densenet,
    "lstm-200": lstm,
    "towers": towers,
    "chain-50": chain,
    "uneven-100": lambda: chain(100, uneven=True),
    "random-100": lambda: random_dag(100),
}
