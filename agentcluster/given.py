"""Times and amounts of memory as users give them, read as dask reads them."""

from __future__ import annotations

import math
from typing import Any

from dask.utils import parse_bytes, parse_timedelta

from agentcluster.errors import ConfigError


def as_seconds(value: Any) -> float:
    """Return a time such as ``"30s"`` or 30 in seconds; not a number for what is none."""
    try:
        return float(parse_timedelta(value, default="seconds"))
    except (ValueError, TypeError, KeyError, AttributeError):
        return math.nan


def time_in(call: str, key: str, value: Any) -> float:
    """Return a time of 0 or more that a call was given, in seconds, or raise :class:`ConfigError`."""
    found = as_seconds(value)
    if not 0 <= found < math.inf:
        raise ConfigError(f"{call}({key}={value!r}): give a time such as '30s' or 30 (seconds)", key=key)
    return found


def bytes_in(call: str, key: str, value: Any) -> int:
    """Return an amount of memory that a call was given, in bytes, or raise :class:`ConfigError`."""
    try:
        return int(parse_bytes(value))
    except (ValueError, TypeError):
        raise ConfigError(f"{call}({key}={value!r}): give bytes, or such as '64 GiB'", key=key) from None
