"""What a plan was made for, as readers of a page, a figure or a table are told it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from rematerialize.units import format_bytes


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a plan comes from. Nothing in it decides anything; what isn't known is empty.

    Attributes
    ----------
    target : str
        The model, as it was asked for.
    dtype : str
        Of its parameters: "float32", or "bfloat16, float32".
    device : str
        What its costs are for.
    computed : bool
        Whether they were computed by formula rather than measured.
    asked : str
        The budget as it was given: "8.00 GiB", "50%", "auto".
    whole : bool
        Whether that is of all that a step holds, rather than of what it allocates.
    reserve_bytes : int
        Part of such a budget that was left for what the step doesn't see, an optimizer's state among it.
    """

    target: str = ""
    dtype: str = ""
    device: str = ""
    computed: bool = False
    asked: str = ""
    whole: bool = False
    reserve_bytes: int = 0

    @property
    def costs(self) -> str:
        """Where times come from; "" if that isn't known."""
        return f"{'computed for' if self.computed else 'measured on'} {self.device}" if self.device else ""

    def line(self) -> str:
        """Type, device and what was asked for, in one line; "" if nothing is known."""
        asked = ""
        if self.asked:
            scope = "a budget" if self.whole else "an activation budget"
            asked = f"asked for: {scope} of {self.asked}"
            asked += f", {format_bytes(self.reserve_bytes)} of it reserved" if self.reserve_bytes else ""
        return "; ".join(filter(None, (self.dtype, f"costs {self.costs}" if self.costs else "", asked)))

    def title(self, what: str) -> str:
        """A heading for a figure: what it shows, of which model, and below it the line."""
        return "\n".join(filter(None, (f"{what} of {self.target}" if self.target else "", self.line())))

    def to_dict(self) -> dict[str, Any]:
        """The origin as JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Origin:
        """Read what a file says; fields that it lacks are empty, and others are ignored.

        Raises
        ------
        ValueError
            If a field is of another type.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"made_for must be an object, got {data!r}")
        found: dict[str, Any] = {}
        for one in fields(cls):
            value = data.get(one.name, one.default)
            if type(value) is not type(one.default) or (isinstance(value, int) and value < 0):
                raise ValueError(f"made_for: {one.name} must be of type {one.type}, got {value!r}")
            found[one.name] = value
        return cls(**found)
