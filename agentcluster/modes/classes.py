"""What is known of worker classes: their import paths and the keywords that they accept.

Nothing is made from a class here and no class of the user's is imported: only distributed's and dask-cuda's own,
lazily, for their signatures. Elsewhere the agent, which has the class, checks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from typing import Any

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
