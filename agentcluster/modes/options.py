"""Options of a mode as a whole, and the keywords that worker classes accept; :mod:`.checks` has the single values."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping

from agentcluster.errors import ConfigError
from agentcluster.modes.checks import (
    Check,
    CheckedOptions,
    OptionPath,
    Options,
    check_env,
    check_known,
    check_memory_limit,
    check_positive,
    check_resources,
    check_sendable,
)

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
