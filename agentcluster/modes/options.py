"""Checks of single option values, and the words of the errors about them.

A check takes the place of a value and the value, and returns it as plain data, or raises :class:`ConfigError` naming
the option, the value and what is allowed. Checking twice gives the same: a mode that came over the wire is checked
again. Nothing here knows a node; what a value means on one is decided in :mod:`agentcluster.modes.sizing`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import json
import math
import numbers
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from agentcluster.errors import ConfigError
from agentcluster.units import parse_nbytes
from agentcluster.wire import plain

SHOWN = 200

#: Most workers that one node may be asked for: more is a slip of the pen, and each is a process.
MOST_WORKERS = 10_000

_JOINS = "workers join the scheduler that their agent joined"

#: Keywords of worker classes that are agentcluster's to set -> why, and the remedy.
RESERVED: Mapping[str, str] = {
    "scheduler": _JOINS,
    "scheduler_ip": _JOINS,
    "scheduler_port": _JOINS,
    "scheduler_file": _JOINS,
    "name": "worker names are given by the node (node-0, node-1, …)",
    "nanny": "the agent ties each worker to its nanny",
    "security": "workers use their agent's credentials; set them with AgentCluster(security=…) or dask-agent --tls-*",
}


@dataclass(frozen=True)
class Place:
    """Where a value was given: the mode and the option, as the user typed them."""

    mode: str
    path: tuple[str, ...] = ()

    @property
    def key(self) -> str | None:
        return ".".join(self.path) or None

    def __str__(self) -> str:
        return f"mode {self.mode!r}, option {self.key!r}" if self.path else f"mode {self.mode!r}"

    def at(self, key: str) -> Place:
        return Place(self.mode, (*self.path, key))

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self}: {problem}", key=self.key)

    def wrong(self, value: object, allowed: str) -> ConfigError:
        return self.error(f"{shown(value)} is not allowed; give {allowed}")

    def unknown(self, key: str, own: Collection[str], keywords: Collection[str] = (), cls: str = "") -> ConfigError:
        """Say that there is no such key: the closest one, what is allowed, and whose keywords are too."""
        close = difflib.get_close_matches(key, sorted({*own, *keywords}), n=1)
        listed = ", ".join(sorted(own)) or "none"
        more = f" and any keyword of {cls}" if cls else ""
        hint = f"did you mean {close[0]!r}? Allowed" if close else "allowed"
        return ConfigError(f"{self}: unknown option {key!r}; {hint}: {listed}{more}", key=self.at(key).key)


Check = Callable[[Place, Any], Any]


def shown(value: object) -> str:
    """Return a value's repr, cut where it is too long for a message."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether `value` is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def positive(place: Place, value: Any) -> int:
    """Check a whole number of at least 1."""
    if not is_whole(value) or value < 1:
        raise place.wrong(value, "a whole number of at least 1")
    return int(value)


def worker_count(place: Place, value: Any) -> int | str:
    """Check a number of workers as ``dask worker --nworkers`` has it: also ``"auto"``, or below 0 from the cores."""
    if isinstance(value, str) and value == "auto":
        return value
    if not is_whole(value) or value == 0:
        raise place.wrong(value, "a whole number of at least 1, 'auto', or a negative one (cores + 1 + nworkers)")
    return _bounded(place, int(value))


def repetitions(place: Place, value: Any) -> int:
    """Check how often a worker is repeated on a node."""
    return _bounded(place, positive(place, value))


def _bounded(place: Place, nworkers: int) -> int:
    if nworkers > MOST_WORKERS:
        raise place.wrong(nworkers, f"at most {MOST_WORKERS} workers a node")
    return nworkers


def memory_amount(value: Any) -> float | int | None:
    """Read a memory limit as :func:`distributed.worker_memory.parse_memory_limit` does, less what needs a machine.

    Returns
    -------
    float | int | None
        A float is a fraction of the node's memory, an int bytes (0: no limit), ``None`` the default share.

    Raises
    ------
    ValueError
        When `value` is none of them.
    """
    if value is None:
        return 0
    if isinstance(value, str):
        if value == "auto":
            return None
        try:
            value = float(value)
        except ValueError:
            return parse_nbytes("memory_limit", value)
    if not is_number(value) or value < 0:
        raise ValueError(value)
    # As in dask, 1 is all of the node and not one byte.
    return float(value) if 0 < value <= 1 else int(value)


def memory_limit(place: Place, value: Any) -> int | float | str:
    """Check a memory limit; it stays as the user wrote it, since a fraction means other bytes on every node."""
    try:
        memory_amount(value)
    except ValueError:
        allowed = "bytes, text such as '4GiB', a fraction of the node's memory up to 1.0, 'auto', or 0 for no limit"
        raise place.wrong(value, allowed) from None
    if value is None:
        return 0
    if isinstance(value, str):
        return value
    return int(value) if is_whole(value) else float(value)


def resources(place: Place, value: Any) -> dict[str, float]:
    """Check abstract resources: amounts by name, or the command line's ``"GPU=2 MEM=10e9"``."""
    allowed = "amounts by name, such as {'GPU': 2}, or text such as 'GPU=2 MEM=10e9'"
    pairs = value
    if isinstance(value, str):
        split = [pair.partition("=") for pair in value.replace(",", " ").split()]
        try:
            pairs = {name: float(amount) for name, _, amount in split}
        except ValueError:
            raise place.wrong(value, allowed) from None
    if not isinstance(pairs, Mapping):
        raise place.wrong(value, allowed)
    for name, amount in pairs.items():
        if not isinstance(name, str) or not name or not is_number(amount) or amount < 0:
            raise place.wrong({name: amount}, allowed)
    return {name: float(amount) for name, amount in pairs.items()}


def env(place: Place, value: Any) -> dict[str, str]:
    """Check environment variables: text or numbers by name."""
    allowed = "text or numbers by variable name, such as {'OMP_NUM_THREADS': 1}"
    if not isinstance(value, Mapping):
        raise place.wrong(value, allowed)
    for name, text in value.items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise place.wrong(name, allowed)
        if not (isinstance(text, str) and "\0" not in text) and not is_number(text):
            raise place.at(name).wrong(text, "text or a number")
    return {name: str(text) for name, text in value.items()}


def devices(place: Place, value: Any) -> list[str]:
    """Check a choice of GPUs: a list, or comma-separated text, of what ``CUDA_VISIBLE_DEVICES`` calls them."""
    allowed = "a list of different GPUs, or comma-separated text, by index or UUID, such as [0, 1] or '0,1'"
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        raise place.wrong(value, allowed)
    if not all(isinstance(item, str) or (is_whole(item) and item >= 0) for item in items):
        raise place.wrong(value, allowed)
    ids = [str(item).strip() for item in items]
    if "" in ids or len(set(ids)) < len(ids):
        raise place.wrong(value, allowed)
    return ids


def as_plain(place: Place, value: Any) -> Any:
    """Let any value pass, as plain data; what is not plain is pickled."""
    try:
        return plain(value)
    except Exception as error:  # cloudpickle lets pass whatever the object's own __reduce__ raises
        raise place.error(f"{shown(value)} cannot be sent to the nodes: {error}") from error


def mapping(place: Place, value: Any, allowed: str) -> dict[str, Any]:
    """Check that a value is a mapping; its keys become text, as on the wire."""
    if not isinstance(value, Mapping):
        raise place.wrong(value, allowed)
    texts = {str(key): item for key, item in value.items()}
    if len(texts) < len(value):
        raise place.wrong(value, "keys that differ as text")
    return texts


def from_json(place: Place, text: str) -> Any:
    """Read JSON text.

    Raises
    ------
    ConfigError
        When it is none; with line and column.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise place.error(f"the text is not JSON, {where}: {error.msg}; got {shown(text)}") from None
    except RecursionError:
        raise place.error("the text is JSON nested too deeply") from None


NANNY = "distributed.Nanny"
WORKER = "distributed.Worker"
CUDA_WORKER = "dask_cuda.CUDAWorker"

#: Every path that leads to one of the classes above.
ALIASES = {
    "dask.distributed.Nanny": NANNY,
    "distributed.nanny.Nanny": NANNY,
    "dask.distributed.Worker": WORKER,
    "distributed.worker.Worker": WORKER,
    "dask_cuda.cuda_worker.CUDAWorker": CUDA_WORKER,
}

# Given by these constructors to the one that they pass **kwargs on to: a second value is a TypeError.
_PASSED_ON = {
    WORKER: {"handlers", "stream_handlers", "connection_args"},
    CUDA_WORKER: {"http_prefix", "env", "plugins", "config", "data"},
}

_BY_KEYWORD = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def canonical(path: str) -> str:
    """Return the one path by which we call a class of distributed or dask-cuda; any other path as it is."""
    return ALIASES.get(path, path)


def path_of(cls: type) -> str:
    return canonical(f"{cls.__module__}.{cls.__qualname__}")


def import_path(cls: type) -> str | None:
    """Return the path by which an agent can import a class.

    A class that is defined in ``__main__``, in a function or in another class has none.
    """
    module = sys.modules.get(cls.__module__)
    if cls.__module__ != "__main__" and getattr(module, cls.__qualname__, None) is cls:
        return path_of(cls)
    return None


def worker_keywords(cls: type) -> frozenset[str] | None:
    """Return the keywords that a worker class accepts.

    Parameters
    ----------
    cls
        A class that is started as a worker.

    Returns
    -------
    frozenset[str] | None
        The names, or ``None`` when they cannot be known: a constructor takes ``**kwargs``, and is neither
        distributed's nor dask-cuda's, so that nobody says where they go.
    """
    definer = next((base for base in cls.__mro__ if "__init__" in vars(base)), object)
    if definer is object:
        return frozenset()
    try:
        parameters = list(inspect.signature(vars(definer)["__init__"]).parameters.values())[1:]
    except (TypeError, ValueError):  # not a function, or one written in C without a signature
        return None
    names = frozenset(p.name for p in parameters if p.kind in _BY_KEYWORD)
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return names
    receiver = _receiver(definer)
    if receiver is None:
        return None
    passed_on = worker_keywords(receiver)
    return None if passed_on is None else names | (passed_on - _PASSED_ON.get(path_of(definer), set()))


def _receiver(definer: type) -> type | None:
    """Return the class whose constructor gets the ``**kwargs`` of `definer`'s."""
    import distributed

    receivers: dict[str, type] = {
        NANNY: distributed.Worker,  # in another process
        WORKER: distributed.core.Server,  # past BaseWorker, which comes first among its bases
        CUDA_WORKER: distributed.Nanny,
    }
    return receivers.get(path_of(definer))


@functools.cache
def known_keywords(path: str) -> frozenset[str] | None:
    """Return the keywords of distributed's or dask-cuda's class at `path`; ``None`` when they cannot be known here.

    dask-cuda need not be installed where a mode is parsed: its class is looked at only where it is.
    """
    if path not in (NANNY, WORKER, CUDA_WORKER):
        return None
    package, _, name = path.rpartition(".")
    if path == CUDA_WORKER and importlib.util.find_spec(package) is None:
        return None
    try:
        cls: Any = getattr(importlib.import_module(package), name)
    except Exception:  # a dask-cuda that does not load here may load on the nodes: their agents check
        return None
    return worker_keywords(cls)
