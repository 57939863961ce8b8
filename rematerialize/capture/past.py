"""Keys and values of the past, which language models return for generation: a training step leaves them out.

A transformers model returns them unless ``use_cache`` says otherwise, in training, too, where nobody reads them and
their memory would be held to the end of the step. Under its own gradient checkpointing the library leaves them out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def without_past(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a call, with ``use_cache=False`` where a config's default alone asks for the past."""
    config = getattr(getattr(forward, "__self__", None), "config", None)
    if getattr(config, "use_cache", None) is not True:
        return dict(kwargs)
    try:
        given = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
        taken = inspect.signature(forward).parameters
    except (TypeError, ValueError):  # the call itself will tell
        return dict(kwargs)
    if "use_cache" not in taken or given.get("use_cache") is not None or given.get("past_key_values") is not None:
        return dict(kwargs)
    return {**kwargs, "use_cache": False}
