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
        signature = inspect.signature(forward)
        given = signature.bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # the call itself will tell
        return dict(kwargs)
    asked = any(given.get(name) is not None for name in ("use_cache", "past_key_values"))
    if asked or "use_cache" not in signature.parameters:
        return dict(kwargs)
    return {**kwargs, "use_cache": False}
