"""Times and amounts of memory as users give them, read as dask reads them."""

from __future__ import annotations

import math
from datetime import timedelta

from dask.utils import parse_bytes, parse_timedelta

from agentcluster.errors import ConfigError

__all__ = ["parse_nbytes", "parse_seconds"]


def parse_seconds(key: str, value: object, *, call: str = "", zero: bool = False) -> float:
    """Parse a time.

    Parameters
    ----------
    key
        Name of the value as the user typed it: a parameter, an option, or a key of the configuration.
    value
        Text such as ``"30s"``, a number of seconds, or a :class:`datetime.timedelta`.
    call
        Name of the function that has the parameter `key`.
    zero
        Allow 0.

    Returns
    -------
    float
        Seconds.

    Raises
    ------
    ConfigError
        When `value` is not a time, is negative or infinite, or is 0 where that is not allowed.

    Examples
    --------
    >>> parse_seconds("--death-timeout", "1.5 minutes")
    90.0
    >>> parse_seconds("timeout", "soon", call="request", zero=True)
    Traceback (most recent call last):
    agentcluster.errors.ConfigError: request(timeout=…) is 'soon', but must be a time of 0 or more, such as '30s', \
'5 minutes' or a number of seconds
    """
    seconds = _seconds(value)
    if not (0 < seconds < math.inf or (zero and seconds == 0)):
        least = "0 or more" if zero else "more than 0"
        raise _wrong(key, value, call, f"a time of {least}, such as '30s', '5 minutes' or a number of seconds")
    return seconds


def parse_nbytes(key: str, value: object, *, call: str = "") -> int:
    """Parse an amount of memory.

    Parameters
    ----------
    key
        Name of the value as the user typed it: a parameter or an option.
    value
        Text such as ``"64 GiB"``, or a number of bytes.
    call
        Name of the function that has the parameter `key`.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ConfigError
        When `value` is not an amount of memory, or is negative.

    Examples
    --------
    >>> parse_nbytes("memory", "64 GiB", call="scale")
    68719476736
    """
    nbytes = _nbytes(value)
    if nbytes < 0:
        raise _wrong(key, value, call, "an amount of memory, such as '64 GiB' or a number of bytes")
    return nbytes


def _seconds(value: object) -> float:
    """Return a time in seconds; not a number when `value` is not a time."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | timedelta):
        return math.nan
    try:
        return float(parse_timedelta(value))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError):
        return math.nan


def _nbytes(value: object) -> int:
    """Return an amount of memory in bytes; -1 when `value` is not one."""
    # For dask, text without a digit is one of its unit, and the empty text is one byte.
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "" or str(value).isspace():
        return -1
    try:
        return int(parse_bytes(value))
    except (ValueError, OverflowError):
        return -1


def _wrong(key: str, value: object, call: str, allowed: str) -> ConfigError:
    where = f"{call}({key}=…)" if call else key
    return ConfigError(f"{where} is {value!r}, but must be {allowed}", key=key)
