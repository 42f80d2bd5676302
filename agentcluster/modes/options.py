"""Options of modes: checks of their values, messages about them, and the keywords that worker classes accept.

A check takes the path of an option and its value, and returns the value as plain data, or raises :class:`ConfigError`
that names the option, the value and what is allowed. Checking a checked value returns the same, so that a mode can be
parsed in each process that receives it. No check knows a node; :mod:`agentcluster.modes.builtin` decides what a value
means on one.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, TypeVar

from distributed.utils import parse_ports

from agentcluster.errors import ConfigError
from agentcluster.units import parse_nbytes, parse_seconds
from agentcluster.wire import is_unicode, plain

#: Options by name. Their values are of many types: each mode, and each worker class, has its own.
Options = Mapping[str, Any]

#: Options that are set, as plain data.
CheckedOptions = dict[str, Any]

#: Length at which a value's repr is cut in a message.
SHOWN = 200

#: Most workers that one node may be asked for: each is a process, and more is a typing error.
MOST_WORKERS = 10_000

#: Greatest number of threads of a worker, or of anything else that is counted.
MOST = 1_000_000

T = TypeVar("T")

#: Most characters of a port.
PORT_DIGITS = 5

#: Least bytes of a worker's memory limit: less is a typing error, such as 4 for "4 GiB".
LEAST_MEMORY = 2**20

#: Most bytes of a memory limit: more cannot be sent.
MOST_MEMORY = 2**62

_JOINS = "workers join the scheduler that their agent joined"

#: Keywords of worker classes that only agentcluster sets -> the reason, and what to do.
RESERVED: Mapping[str, str] = {
    "scheduler": _JOINS,
    "scheduler_ip": _JOINS,
    "scheduler_port": _JOINS,
    "scheduler_file": _JOINS,
    "name": "worker names are given by the node (node-0, node-1, …)",
    "nanny": "the agent ties each worker to its nanny",
    "security": "workers use their agent's credentials; set them with AgentCluster(security=…) or dask-agent --tls-*",
}


# -- paths and messages ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptionPath:
    """Path of an option, as the user typed it, for messages.

    Attributes
    ----------
    mode
        Name of the mode.
    keys
        Names of the option and of those that it is in, outermost first; () for the mode itself.
    of
        Word before the name of the mode; "" where the options are those of an argument, whose name stands for a mode's.
    """

    mode: str
    keys: tuple[str, ...] = ()
    of: str = "mode "

    @property
    def key(self) -> str | None:
        """Names with dots between them; None for the mode itself."""
        return ".".join(self.keys) or None

    def __str__(self) -> str:
        owner = f"{self.of}{self.mode!r}" if self.of else self.mode
        return f"{owner}, option {self.key!r}" if self.keys else owner

    def at(self, key: str) -> OptionPath:
        """Return the path of an option within this one.

        Parameters
        ----------
        key
            Name of the option.
        """
        return replace(self, keys=(*self.keys, key))

    def error(self, problem: str) -> ConfigError:
        """Return an error about this option.

        Parameters
        ----------
        problem
            The message after the option's path.
        """
        return ConfigError(f"{self}: {problem}", key=self.key)

    def not_allowed(self, value: object, allowed: str) -> ConfigError:
        """Return an error about a value.

        Parameters
        ----------
        value
            The value.
        allowed
            Description of the values that are allowed.
        """
        return self.error(f"{shown(value)} is not allowed; give {allowed}")

    def unknown(self, key: str, known: Collection[str], keywords: Collection[str] = (), cls: str = "") -> ConfigError:
        """Return an error about the name of an option, with the closest name that is allowed.

        Parameters
        ----------
        key
            The name.
        known
            Names that are allowed.
        keywords, cls
            Further names, and the class whose keywords they are.
        """
        close = difflib.get_close_matches(key, sorted({*known, *keywords}), n=1)
        listed = ", ".join(sorted(known)) or "none"
        more = f" and any keyword of {cls}" if cls else ""
        hint = f"did you mean {close[0]!r}? Allowed" if close else "allowed"
        return ConfigError(f"{self}: unknown option {key!r}; {hint}: {listed}{more}", key=self.at(key).key)


def once(option: str, pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Return the values of an option of a command by name.

    Parameters
    ----------
    option
        The option.
    pairs
        Names and values, as they were given.

    Raises
    ------
    ConfigError
        For a name that is given twice.
    """
    found: dict[str, T] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"{option} {name!r} is given twice, as {found[name]!r} and {value!r}; give one")
        found[name] = value
    return found


def shown(value: object) -> str:
    """Return a value's repr, cut where it is too long for a message.

    Parameters
    ----------
    value
        The value.
    """
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


# -- checks of single values -------------------------------------------------------------------------------------------

#: Returns the checked value of an option, or raises :class:`ConfigError`.
Check = Callable[[OptionPath, object], object]


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number, and no bool.

    Parameters
    ----------
    value
        The value.
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a number that a float can hold, and no bool.

    Parameters
    ----------
    value
        The value.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_positive(path: OptionPath, value: object) -> int:
    """Check a whole number of at least 1.

    Parameters
    ----------
    path, value
        The option.

    Raises
    ------
    ConfigError
        For another value.
    """
    if not is_whole(value) or value < 1:
        raise path.not_allowed(value, "a whole number of at least 1")
    if value > MOST:
        raise path.not_allowed(value, f"at most {MOST}")
    return int(value)


def check_flag(path: OptionPath, value: object) -> bool:
    """Check a bool; 0 and "no" are none.

    Parameters
    ----------
    path, value
        The option.

    Raises
    ------
    ConfigError
        For another value.
    """
    if not isinstance(value, bool):
        raise path.not_allowed(value, "True or False")
    return value


def check_worker_count(path: OptionPath, value: object) -> int | str:
    """Check a number of workers as ``dask worker --nworkers`` takes it.

    Parameters
    ----------
    path, value
        The option.

    Returns
    -------
    int or str
        ``"auto"``, or a number; one below 0 counts down from the number of cores.

    Raises
    ------
    ConfigError
        For another value.
    """
    if isinstance(value, str) and value == "auto":
        return value
    if not is_whole(value) or value == 0:
        raise path.not_allowed(value, "a whole number of at least 1, 'auto', or a negative one (cores + 1 + nworkers)")
    return _bounded(path, int(value))


def check_repetitions(path: OptionPath, value: object) -> int:
    """Check the number of times that a worker is repeated on a node.

    Parameters
    ----------
    path, value
        The option.

    Raises
    ------
    ConfigError
        For another value than a whole number from 1 to :data:`MOST_WORKERS`.
    """
    return _bounded(path, check_positive(path, value))


def _bounded(path: OptionPath, nworkers: int) -> int:
    if abs(nworkers) > MOST_WORKERS:
        raise path.not_allowed(nworkers, f"at most {MOST_WORKERS} workers a node")
    return nworkers


def memory_amount(value: object) -> float | int | None:
    """Read a memory limit as :func:`distributed.worker_memory.parse_memory_limit` does, without the node's memory.

    Parameters
    ----------
    value
        The limit.

    Returns
    -------
    float, int or None
        A float is a fraction of the node's memory, an int bytes (0: no limit), None the default share.

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
    # As in dask, 1 is all of the node's memory and not one byte.
    return float(value) if 0 < value <= 1 else int(value)


def check_memory_limit(path: OptionPath, value: object) -> int | float | str:
    """Check a memory limit; it stays as the user wrote it, since a fraction means other bytes on every node.

    Parameters
    ----------
    path, value
        The option.

    Raises
    ------
    ConfigError
        For a value that :func:`memory_amount` cannot read.
    """
    try:
        amount = memory_amount(value)
    except ValueError:
        allowed = "bytes, text such as '4GiB', a fraction of the node's memory up to 1.0, 'auto', or 0 for no limit"
        raise path.not_allowed(value, allowed) from None
    if is_whole(amount) and amount > MOST_MEMORY:
        raise path.not_allowed(value, f"at most {MOST_MEMORY} bytes, or 0 for no limit")
    if is_whole(amount) and 0 < amount < LEAST_MEMORY:
        raise path.not_allowed(value, f"at least {LEAST_MEMORY} bytes, such as '{amount} GiB', or 0 for no limit")
    if is_whole(value) and value == 1:
        raise path.not_allowed(value, "1.0 for all of the node's memory, or text such as '1 GiB'")
    if value is None:
        return 0
    if isinstance(value, str):
        return value
    assert is_number(value)
    return int(value) if is_whole(value) else float(value)


def check_resources(path: OptionPath, value: object) -> dict[str, float]:
    """Check abstract resources.

    Parameters
    ----------
    path, value
        The option: amounts by name, or text as the command line takes it, such as ``"GPU=2 MEM=10e9"``.

    Raises
    ------
    ConfigError
        For another value.
    """
    allowed = "amounts by name, such as {'GPU': 2}, or text such as 'GPU=2 MEM=10e9'"
    amounts = value
    if isinstance(value, str):
        pairs = [pair.partition("=") for pair in value.replace(",", " ").split()]
        try:
            amounts = {name: float(amount) for name, _, amount in pairs}
        except ValueError:
            raise path.not_allowed(value, allowed) from None
    if not isinstance(amounts, Mapping):
        raise path.not_allowed(value, allowed)
    for name, amount in amounts.items():
        if not isinstance(name, str) or not name or not is_number(amount) or amount < 0:
            raise path.not_allowed({name: amount}, allowed)
    return {name: float(amount) for name, amount in amounts.items()}


def check_env(path: OptionPath, value: object) -> dict[str, str]:
    """Check environment variables.

    Parameters
    ----------
    path, value
        The option: text or numbers by name.

    Raises
    ------
    ConfigError
        For another value.
    """
    allowed = "text or numbers by variable name, such as {'OMP_NUM_THREADS': 1}"
    if not isinstance(value, Mapping):
        raise path.error(f"a value of type {type(value).__name__} is not allowed; give {allowed}")  # no secret is shown
    for name, text in value.items():
        if not is_text(name) or not name or "=" in name:
            raise path.not_allowed(name, allowed)
        if not is_text(text) and not is_number(text):
            raise path.at(name).error(
                f"a value of type {type(text).__name__} is not allowed; give a number, or text without NUL"
            )
    return {name: str(text) for name, text in value.items()}


def check_labels(path: OptionPath, value: object) -> dict[str, str]:
    """Check labels of a host.

    Parameters
    ----------
    path, value
        The option: text by name.

    Raises
    ------
    ConfigError
        For another value.
    """
    if not isinstance(value, Mapping) or not all(isinstance(each, str) for each in (*value, *value.values())):
        raise path.not_allowed(value, "text by name, such as {'rack': 'a'}")
    return dict(value)


def check_devices(path: OptionPath, value: object) -> list[str]:
    """Check a choice of GPUs.

    Parameters
    ----------
    path, value
        The option: a list, or comma-separated text, of indices or UUIDs as ``CUDA_VISIBLE_DEVICES`` takes them.

    Raises
    ------
    ConfigError
        For another value, or for a GPU that is named twice.
    """
    allowed = "a list of different GPUs, or comma-separated text, by index or UUID, such as [0, 1] or '0,1'"
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        raise path.not_allowed(value, allowed)
    if not all(isinstance(item, str) or (is_whole(item) and item >= 0) for item in items):
        raise path.not_allowed(value, allowed)
    ids = [str(item).strip() for item in items]
    if "" in ids or len(set(ids)) < len(ids):
        raise path.not_allowed(value, allowed)
    return ids


def check_sendable(path: OptionPath, value: object) -> object:
    """Return any value as plain data; what is not plain is pickled.

    Parameters
    ----------
    path, value
        The option.

    Raises
    ------
    ConfigError
        When the value cannot be pickled.
    """
    try:
        found: object = plain(value)
    except Exception as error:  # cloudpickle lets pass whatever the object's own __reduce__ raises
        raise path.error(f"{shown(value)} cannot be sent to the nodes: {error}") from error
    return found


def check_mapping(path: OptionPath, value: object, allowed: str) -> CheckedOptions:
    """Check that a value is a mapping; its keys become text, as on the wire.

    Parameters
    ----------
    path, value
        The option.
    allowed
        Description of the mappings that are allowed.

    Raises
    ------
    ConfigError
        For another value, or for two keys with the same text.
    """
    if not isinstance(value, Mapping):
        raise path.not_allowed(value, allowed)
    texts = {str(key): item for key, item in value.items()}
    if len(texts) < len(value):
        raise path.not_allowed(value, "keys that differ as text")
    return texts


def parse_json(path: OptionPath, text: str) -> object:
    """Parse JSON text.

    Parameters
    ----------
    path
        The option that has the text.
    text
        The text.

    Raises
    ------
    ConfigError
        When it is not JSON; with line and column.
    """
    try:
        found: object = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise path.error(f"the text is not JSON, {where}: {error.msg}; got {shown(text)}") from None
    except ValueError:  # of Python
        raise path.error(f"the text has a number of too many digits; got {shown(text)}") from None
    except RecursionError:
        raise path.error("the text is JSON nested too deeply") from None
    return found


# -- checks of keywords of dask's workers ------------------------------------------------------------------------------


def check_text(path: OptionPath, value: object) -> str:
    """Check text, such as the name of a folder or of an interface.

    Parameters
    ----------
    path, value
        The option.

    Raises
    ------
    ConfigError
        For another value.
    """
    if not is_text(value) or not value:
        raise path.not_allowed(value, "text without NUL")
    return value


def is_text(value: object) -> TypeGuard[str]:
    """Return whether a value is text that a process can be given: it has no NUL, and is Unicode.

    Parameters
    ----------
    value
        The value.
    """
    return isinstance(value, str) and "\0" not in value and is_unicode(value)


def check_path(path: OptionPath, value: object) -> str:
    """Check the path of a file or a folder; it stays text.

    Parameters
    ----------
    path, value
        The option.

    Raises
    ------
    ConfigError
        For another value.
    """
    return check_text(path, str(value) if isinstance(value, os.PathLike) else value)


def check_duration(path: OptionPath, value: object) -> object:
    """Check a time; it stays as the user wrote it.

    Parameters
    ----------
    path, value
        The option.

    Raises
    ------
    ConfigError
        For another value.
    """
    parse_seconds(str(path), value, zero=True)
    return plain(value)


def check_ports(path: OptionPath, value: object) -> object:
    """Check a port, or a range of them.

    Parameters
    ----------
    path, value
        The option: a number, text such as ``"9000:9010"``, or a list of numbers.

    Raises
    ------
    ConfigError
        For another value, and for a port above 65535.
    """
    # A range is listed in full.
    long = isinstance(value, str) and any(len(port) > PORT_DIGITS for port in value.replace(" ", "").split(":"))
    ports: Collection[object] = ()
    if isinstance(value, int | str | Collection) and not isinstance(value, bool) and not long:
        with contextlib.suppress(ValueError, TypeError):
            ports = parse_ports(value)
    if not ports or not all(port is None or (is_whole(port) and 0 <= port < 65536) for port in ports):
        raise path.not_allowed(value, "a port from 0 to 65535, or a range, such as 9000:9010")
    return plain(value)


def check_http_address(path: OptionPath, value: object) -> object:
    """Check where a dashboard is.

    Parameters
    ----------
    path, value
        The option: a port, or text such as ``":8787"`` or ``"127.0.0.1:8787"``; or several, in a list or with commas.

    Raises
    ------
    ConfigError
        For another value, and for a port above 65535.
    """
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    if not items or not all(map(_is_http_address, items)):
        raise path.not_allowed(value, "a port, or an address such as ':8787' or '127.0.0.1:8787'")
    return plain(value)


def _is_http_address(value: object) -> bool:
    """Return whether dask can read a port, a host, or both."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return False
    host, colon, port = str(value).rpartition(":")
    if not colon and not port.isdecimal():
        host, port = port, "0"
    usable = ":" not in host and host.isprintable() and len(host) <= 253  # as for a name in DNS
    return usable and port.isdecimal() and len(port) <= PORT_DIGITS and int(port) < 65536


def check_texts(path: OptionPath, value: object) -> object:
    """Check text, or a list of texts.

    Parameters
    ----------
    path, value
        The option.

    Raises
    ------
    ConfigError
        For another value.
    """
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(map(is_text, items)):
        raise path.not_allowed(value, "text, or a list of texts")
    return plain(value)


#: Keywords of dask's workers, nannies and schedulers with a value of one type -> their check; None is "not set".
KEYWORDS: Mapping[str, Check] = {
    **dict.fromkeys(
        ("host", "interface", "protocol", "contact_address", "listen_address", "scheduler_sni"), check_text
    ),
    **dict.fromkeys(("http_prefix", "dashboard_prefix"), check_text),
    "local_directory": check_path,
    **dict.fromkeys(("lifetime", "lifetime_stagger", "death_timeout", "heartbeat_interval"), check_duration),
    **dict.fromkeys(("dashboard", "lifetime_restart"), check_flag),
    **dict.fromkeys(("port", "worker_port", "nanny_port"), check_ports),
    "dashboard_address": check_http_address,
    **dict.fromkeys(("preload", "preload_argv", "preload_nanny", "preload_nanny_argv"), check_texts),
}


def check_known(path: OptionPath, value: object) -> object:
    """Check the value of a keyword of dask's workers, nannies or schedulers that is one of :data:`KEYWORDS`.

    Parameters
    ----------
    path, value
        The option; its last name is the keyword.

    Returns
    -------
    object
        The value; of another keyword as it is.

    Raises
    ------
    ConfigError
        For a value of another type than the keyword has.
    """
    check = KEYWORDS.get(path.keys[-1])
    return value if check is None or value is None else check(path, value)


#: Keywords of every worker on a host that modes check too, or that only hosts have -> their check.
CHECKS: Mapping[str, Check] = {"resources": check_resources, "env": check_env, "labels": check_labels}


def check_keywords(argument: str, options: Mapping[str, object]) -> dict[str, Any]:
    """Check the values of keywords of dask's workers or schedulers.

    Parameters
    ----------
    argument
        Name of the argument that has them, for messages.
    options
        The keywords; None is "not set".

    Returns
    -------
    dict
        The keywords as the user wrote them.

    Raises
    ------
    ConfigError
        For a value of another type than the keyword has.
    """
    where = OptionPath(argument, of="")
    for key, value in options.items():
        if value is not None:
            CHECKS.get(key, check_known)(where.at(key), value)
    return dict(options)


# -- checks of all options ---------------------------------------------------------------------------------------------

#: Options of every worker -> their check.
COMMON: Mapping[str, Check] = {
    "nthreads": check_positive,
    "memory_limit": check_memory_limit,
    "resources": check_resources,
    "env": check_env,
}


def check_options(
    path: OptionPath, config: Options, known: Mapping[str, Check], cls: str | None = None
) -> CheckedOptions:
    """Check options by name and value.

    Parameters
    ----------
    path
        Path of the options.
    config
        The options; None as a value is "not set", but for ``memory_limit``, where it is no limit.
    known
        Options of agentcluster -> their check.
    cls
        Import path of a class whose keywords are allowed too.

    Returns
    -------
    dict
        The options that are set, as plain data.

    Raises
    ------
    ConfigError
        For a name or a value that is not allowed.
    """
    keywords = frozenset[str]() if cls is None else known_keywords(cls)
    # A worker class of the user's may take keywords that only it knows.
    open_ended = keywords is None or ("worker_class" in keywords and config.get("worker_class") is not None)
    checked = {}
    for key, value in config.items():
        if key in RESERVED and cls is not None:
            raise reserved(path.at(key))
        if key in known:
            if value is not None or key == "memory_limit":
                checked[key] = known[key](path.at(key), value)
        elif open_ended or keywords is None:
            checked[key] = check_sendable(path.at(key), value)
        elif key in keywords:
            checked[key] = check_sendable(path.at(key), check_known(path.at(key), value))
        else:
            raise path.unknown(key, known, keywords, cls or "")
    return checked


def reserved(path: OptionPath) -> ConfigError:
    """Return the error for a keyword that only agentcluster sets.

    Parameters
    ----------
    path
        Path of the keyword, one of :data:`RESERVED`.
    """
    return path.error(f"it cannot be set: {RESERVED[path.keys[-1]]}")


# -- worker classes ----------------------------------------------------------------------------------------------------

NANNY = "distributed.Nanny"
WORKER = "distributed.Worker"
CUDA_WORKER = "dask_cuda.CUDAWorker"

#: Other paths that lead to one of the classes above.
ALIASES: Mapping[str, str] = {
    "dask.distributed.Nanny": NANNY,
    "distributed.nanny.Nanny": NANNY,
    "dask.distributed.Worker": WORKER,
    "distributed.worker.Worker": WORKER,
    "dask_cuda.cuda_worker.CUDAWorker": CUDA_WORKER,
}

#: Keywords that a constructor sets itself where it passes ``**kwargs`` on: a second value is a TypeError.
_PASSED_ON: Mapping[str, frozenset[str]] = {
    WORKER: frozenset({"handlers", "stream_handlers", "connection_args"}),
    CUDA_WORKER: frozenset({"http_prefix", "env", "plugins", "config", "data"}),
}

_BY_KEYWORD = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def canonical(path: str) -> str:
    """Return the one path that stands for a class of distributed or dask-cuda.

    Parameters
    ----------
    path
        Import path of a class; one of another package is returned as it is.
    """
    return ALIASES.get(path, path)


def import_path(cls: type) -> str | None:
    """Return the path by which an agent can import a class.

    Parameters
    ----------
    cls
        The class.

    Returns
    -------
    str or None
        None for a class that is defined in ``__main__``, in a function or in another class.
    """
    module = sys.modules.get(cls.__module__)
    if cls.__module__ != "__main__" and getattr(module, cls.__qualname__, None) is cls:
        return _path_of(cls)
    return None


def _path_of(cls: type) -> str:
    return canonical(f"{cls.__module__}.{cls.__qualname__}")


def worker_keywords(cls: type) -> frozenset[str] | None:
    """Return the keywords that a worker class accepts.

    Parameters
    ----------
    cls
        A class that is started as a worker.

    Returns
    -------
    frozenset of str or None
        None when they cannot be known: a constructor takes ``**kwargs``, and is neither distributed's nor dask-cuda's,
        so that it is not known where they go.
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
    return None if passed_on is None else names | (passed_on - _PASSED_ON.get(_path_of(definer), frozenset()))


def _receiver(definer: type) -> type | None:
    """Return the class whose constructor gets the ``**kwargs`` of `definer`'s."""
    import distributed

    receivers: dict[str, type] = {
        NANNY: distributed.Worker,  # in another process
        WORKER: distributed.core.Server,  # past BaseWorker, which comes first among its bases
        CUDA_WORKER: distributed.Nanny,
    }
    return receivers.get(_path_of(definer))


@functools.cache
def known_keywords(path: str) -> frozenset[str] | None:
    """Return the keywords of a class of distributed or dask-cuda.

    Parameters
    ----------
    path
        Import path of the class.

    Returns
    -------
    frozenset of str or None
        None when they cannot be known here: for a class of another package, and for dask-cuda's where it is not
        installed. It need not be where a mode is parsed.
    """
    if path not in (NANNY, WORKER, CUDA_WORKER):
        return None
    package, _, name = path.rpartition(".")
    if path == CUDA_WORKER and importlib.util.find_spec(package) is None:
        return None
    try:
        cls: type = getattr(importlib.import_module(package), name)
    except Exception:  # a dask-cuda that does not load here may load on the nodes: their agents check
        return None
    return worker_keywords(cls)
