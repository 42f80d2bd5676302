"""Values for tests of arguments and options: most are wrong for each; a :data:`Right` tells those that are not."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping
from typing import Any

from dask.utils import parse_bytes, parse_timedelta
from hypothesis import strategies as st

#: Returns whether a value is right for an argument, or may be: then it is not tried.
Right = Callable[[Any], bool]


def is_int(value: Any, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def parsed(parse: Callable[[Any], Any], value: Any) -> float:
    """Return a number that dask reads out of a value, or not a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | datetime.timedelta):
        return math.nan
    try:
        return float(parse(value))
    except Exception:
        return math.nan


def seconds(least: Callable[[float], bool]) -> Right:
    return lambda value: least(parsed(parse_timedelta, value)) and math.isfinite(parsed(parse_timedelta, value))


def maybe(right: Right) -> Right:
    return lambda value: value is None or right(value)


def one_of(*allowed: object) -> Right:
    return lambda value: any(value is each or (isinstance(value, str) and value == each) for each in allowed)


def nbytes(value: Any) -> bool:
    amount = -1.0 if isinstance(value, str) and (not value.strip() or "-" in value) else parsed(parse_bytes, value)
    return amount >= 0 and not (isinstance(value, float) and value < 0)


def nothing(value: Any) -> bool:
    return False


def maybe_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(value.strip()))


def anything(value: Any) -> bool:
    return True


TIME, TIME_0 = maybe(seconds(lambda s: s > 0)), maybe(seconds(lambda s: s >= 0))
COUNT = maybe(lambda value: is_int(value, 0, 2**62))
FLAG: Right = lambda value: isinstance(value, bool)  # noqa: E731
TEXT: Right = lambda value: isinstance(value, str)  # noqa: E731
OPTIONS: Right = maybe(lambda value: isinstance(value, Mapping) and not value)
LIMIT: Right = maybe(lambda value: is_int(value, 0, 2**62) or value == math.inf)


class Thing:
    """Of no use to anybody."""

    def __repr__(self) -> str:
        return "Thing()"


#: Values that each argument is given, right or wrong.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 65536, 10**30, -(10**30), 0.0, 1.5, -0.5, math.nan, math.inf, -math.inf),
    *("", " ", "x", "no", "1e400", "nan", "-1", "5 potatoes", "a\0b", "\x1b[31m", "ä" * 40, "tcp://", "x" * 3000),
    *([], (), {}, set(), [None], [5], ["x"], {"x": 1}, {5: "x"}, {"x": None}, b"x", object, Thing(), 1j, range(3)),
    *(datetime.timedelta(seconds=-1), lambda: None, Ellipsis, NotImplemented, ValueError("x")),
]

#: Texts that each option of a command is given, right or wrong. No command line has NUL; the last is of no UTF-8.
TEXTS: list[str] = [
    *("", " ", "x", "no", "None", "0", "1", "7", "-1", "1.5", "-0.5", "65536", "1" * 30, "-" + "1" * 30, "1" * 5000),
    *("1e400", "nan", "inf", "-inf", "5 potatoes", "-5 GiB", "1e400 GiB", "a\nb", "\x1b[31m", "ä" * 40, "x" * 3000),
    *("tcp://", "tcp://x:99999", "tcp://x:0", "9:8", "9:9999999999", "{", "[1]", "null", "[" * 20_000, "=", "=1", "a="),
    *(",", "gpu=²", "gpu=1.5", "GPU=-1", "GPU=nan", "\udcff"),
]

#: Further values, as hypothesis makes them.
MORE = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.binary(max_size=5),
        st.integers(),
        st.floats(),
        st.lists(st.integers() | st.text(max_size=3), max_size=3),
        st.dictionaries(st.text(max_size=3), st.none() | st.integers(), max_size=2),
    ),
    min_size=2,
    max_size=2,
)


def check_sentence(said: str, about: str, argument: str, value: object, *also: str) -> None:
    """Hold that an error is one sentence, and names the argument, the value, a part of it, or one of `also`."""
    assert said, about
    assert "\n" not in said, about
    shown = [repr(value)[:15], *map(repr, value if isinstance(value, dict | list) else ())]
    assert argument in said or any(each in said for each in (*shown, *also)), (about, said)
