"""Times and amounts of memory as users give them, read as dask reads them."""

from __future__ import annotations

import math
from datetime import timedelta

from dask.utils import parse_bytes, parse_timedelta

from agentcluster.errors import ConfigError


def as_seconds(value: object) -> float:
    """Return a time such as ``"30s"`` or 30 in seconds; not a number for what is none."""
    if not isinstance(value, str | float | int | timedelta):
        return math.nan
    try:
        return float(parse_timedelta(value, default="seconds"))
    except (ValueError, TypeError, KeyError, AttributeError):
        return math.nan


def call_seconds(call: str, key: str, value: object) -> float:
    """Return a time of 0 or more that a call was given, in seconds, or raise :class:`ConfigError`."""
    found = as_seconds(value)
    if not 0 <= found < math.inf:
        raise ConfigError(f"{call}({key}={value!r}): give a time such as '30s' or 30 (seconds)", key=key)
    return found


def call_bytes(call: str, key: str, value: object) -> int:
    """Return an amount of memory that a call was given, in bytes, or raise :class:`ConfigError`."""
    try:
        if not isinstance(value, str | float | int):
            raise TypeError(value)
        return int(parse_bytes(value))
    except (ValueError, TypeError):
        raise ConfigError(f"{call}({key}={value!r}): give bytes, or such as '64 GiB'", key=key) from None


def positive_seconds(key: str, value: object) -> float:
    """Return a time in seconds, or raise :class:`ConfigError` that names `key`."""
    number = as_seconds(value)
    if not number > 0:
        raise ConfigError(f"{key} {value!r} must be a time above 0, such as 30 (seconds) or '1 minute'", key=key)
    return number


def seconds_or_default(key: str, value: object, default: float) -> float:
    """Return a time that the user gave, in seconds, or the default where none was given."""
    if value is None:
        return default
    found = as_seconds(value)
    if not 0 < found < math.inf:
        raise ConfigError(f"{key}={value!r} must be a time above 0, such as '30s' or 30 (seconds)", key=key)
    return found
