"""SPEC: an example input as ``name=dtype[dims]``, read without torch.

    input_ids=int64[8,2048]          a keyword argument
    float32[8,3,224,224]             a positional one
    input_ids=int64[8,2048]<50257    integers below a bound
    flag=bool[]                      a scalar tensor

Types may be torch's names or their usual short forms (``f32``, ``bf16``, ``i64``, ``long``). Floats are drawn from a
seeded normal distribution, bools are true. Integers are drawn below the bound; without one, below the smallest
embedding table of the model if the argument's name speaks of ids or tokens, and otherwise they are 0, which is valid
as an index and as a class whatever the model does with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rematerialize.errors import TargetError, did_you_mean

FLOATS = {
    "float64": ("double", "f64"),
    "float32": ("float", "f32", "fp32"),
    "float16": ("half", "f16", "fp16"),
    "bfloat16": ("bf16",),
}
INTEGERS = {
    "int64": ("long", "i64"),
    "int32": ("int", "i32"),
    "int16": ("short", "i16"),
    "int8": ("i8",),
    "uint8": ("u8", "byte"),
}
_OTHERS = {"bool": ("b1",), "complex64": ("c64", "cfloat"), "complex128": ("c128", "cdouble")}
_ALIASES = {
    alias: name for group in (FLOATS, INTEGERS, _OTHERS) for name, short in group.items() for alias in (name, *short)
}
_SHAPE = re.compile(
    r"(?:(?P<name>[^=]*)=)?\s*(?P<dtype>[^\[\]<>=]*?)\s*\[(?P<dims>[^\[\]]*)\]\s*(?:<\s*(?P<bound>.*))?"
)
_EXAMPLE = "write for example input_ids=int64[8,2048]"
_LARGEST = 2**59  # of all elements: those of 16 bytes are as many as torch can count bytes of


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One example input.

    Attributes
    ----------
    name : str
        Of the keyword argument; an empty string for a positional one.
    dtype : str
        Torch's name.
    shape : tuple of int
    bound : int or None
        Integers are below it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bound: int | None = None

    def __str__(self) -> str:
        head = f"{self.name}=" if self.name else ""
        tail = "" if self.bound is None else f"<{self.bound}"
        return f"{head}{self.dtype}[{','.join(map(str, self.shape))}]{tail}"


def parse_spec(text: str) -> InputSpec:
    """Read one SPEC.

    Raises
    ------
    TargetError
        Says what was expected.

    Examples
    --------
    >>> parse_spec("input_ids=long[8,2048]<50257")
    InputSpec(name='input_ids', dtype='int64', shape=(8, 2048), bound=50257)
    """
    match = _SHAPE.fullmatch(text.strip())
    if match is None:
        raise TargetError(f"expected an input as NAME=DTYPE[DIMS] or DTYPE[DIMS], got {text!r}; {_EXAMPLE}")
    name = match["name"]
    if name is not None and not name.strip().isidentifier():
        raise TargetError(
            f"expected the name of an argument before the =, got {name.strip()!r} in {text!r}; {_EXAMPLE}"
        )
    dtype = parse_dtype(match["dtype"], f"in the input {text!r}")
    shape = tuple(_size(part, text) for part in match["dims"].split(",")) if match["dims"].strip() else ()
    elements = 1
    for size in shape:
        elements *= size
    if elements > _LARGEST:
        raise TargetError(f"expected at most {_LARGEST} elements, got {elements} in the input {text!r}")
    return InputSpec("" if name is None else name.strip(), dtype, shape, _bound(match["bound"], dtype, text))


def parse_specs(texts: Sequence[str]) -> tuple[InputSpec, ...]:
    """Read all SPECs of a call, which are either all positional or all keywords.

    Raises
    ------
    TargetError
        If one can't be read, or they mix, or a name comes twice.
    """
    specs = tuple(parse_spec(text) for text in texts)
    names = [spec.name for spec in specs]
    if any(names) and not all(names):
        raise TargetError(
            f"expected inputs that are all NAME=DTYPE[DIMS] or all DTYPE[DIMS], got {' '.join(texts)}; name all of them"
        )
    twice = next((name for name in names if name and names.count(name) > 1), "")
    if twice:
        raise TargetError(f"expected every input once, got {twice!r} more than once; leave one of them out")
    return specs


def parse_dtype(text: str, where: str, *, floating: bool = False) -> str:
    """Read a type's name or short form; ``where`` ends the message.

    Raises
    ------
    TargetError
        Names the closest match.
    """
    name = _ALIASES.get(text.strip().removeprefix("torch.").lower(), "")
    known = FLOATS if floating else _ALIASES
    if not name or (floating and name not in FLOATS):
        what = f"one of {', '.join(FLOATS)}" if floating else "a type such as float32, bfloat16, int64 or bool"
        raise TargetError(f"expected {what} {where}, got {text!r}{did_you_mean(text.strip(), known)}")
    return name


def _size(part: str, text: str) -> int:
    if not re.fullmatch(r"\s*[0-9]{1,18}\s*", part):
        raise TargetError(
            f"expected sizes between the brackets, got {part.strip()!r} in the input {text!r}; {_EXAMPLE}"
        )
    return int(part)


def _bound(part: str | None, dtype: str, text: str) -> int | None:
    if part is None:
        return None
    if dtype not in INTEGERS:
        raise TargetError(f"expected an integer type before the bound <{part}, got {dtype} in the input {text!r}")
    if not re.fullmatch(r"\s*[0-9]{1,18}\s*", part) or int(part) < 1:
        raise TargetError(f"expected a bound of at least 1 behind the <, got {part.strip()!r} in the input {text!r}")
    return int(part)
