"""Times, amounts of memory and addresses as users give them, read as dask reads them."""

from __future__ import annotations

import math
from datetime import timedelta

from dask.utils import parse_bytes, parse_timedelta

from agentcluster.errors import ConfigError

__all__ = ["parse_nbytes", "parse_seconds", "split_address"]


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


def split_address(address: str) -> tuple[str, int]:
    """Split an address into its host and its port.

    Parameters
    ----------
    address
        An address of dask's, such as ``"tcp://10.0.0.1:8786"``.

    Returns
    -------
    host : str
        Name or number of the host.
    port : int
        The port, from 0 to 65535.

    Raises
    ------
    ValueError
        When a part is missing, or nothing can have it; with the reason.

    Examples
    --------
    >>> split_address("tcp://10.0.0.1:8786")
    ('10.0.0.1', 8786)
    """
    from distributed.comm.addressing import get_address_host_port  # heavy, and times are read everywhere

    host, port = get_address_host_port(address, strict=True)
    if not 0 <= port < 65536:
        raise ValueError(f"port {str(port)[:20]} is not one from 0 to 65535")
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError("its host is not a name of a host") from None
    if not host or not address.isprintable():
        raise ValueError("its host is not a name of a host")
    return host, int(port)


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
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return -1
    # For dask, text without a digit is one of its unit, the empty text is one byte, and -0.5 is 0.
    text = str(value).strip()
    if not text or text.startswith("-"):
        return -1
    try:
        return int(parse_bytes(value))
    except (ValueError, OverflowError):
        return -1


def _wrong(key: str, value: object, call: str, allowed: str) -> ConfigError:
    where = f"{call}({key}=…)" if call else key
    return ConfigError(f"{where} is {value!r}, but must be {allowed}", key=key)
