"""Every error that agentcluster raises on purpose, in one tree.

::

    AgentClusterError
    ├── ConfigError (ValueError)      bad input: which value, where, what is allowed
    │   ├── ModeRefused               a node cannot serve a mode: which node, why
    │   └── VersionMismatch           two processes speak different versions of the protocol
    ├── PreflightError (ValueError)   one or more refusals; nothing was touched
    ├── NodeNotFound (LookupError)    no node of that name
    ├── NodeExists (ValueError)       a node of that name is already there
    ├── LaunchError (RuntimeError)    an agent did not come to run on a host
    │   └── LaunchTimeout (TimeoutError)
    ├── WorkerStartError (RuntimeError)  an agent could not start a worker
    ├── SwapError (RuntimeError)      a swap did not end as asked; says what is true now
    ├── RolloutBusy (RuntimeError)    another rollout runs
    └── SchedulerUnfit (RuntimeError) the scheduler cannot run agentcluster's plugin

Each stores its facts as attributes, reads as one sentence, and survives pickling (also with the keyword
arguments of its constructor), because most of them travel from the scheduler to a client.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "AgentClusterError",
    "ConfigError",
    "LaunchError",
    "LaunchTimeout",
    "ModeRefused",
    "NodeExists",
    "NodeNotFound",
    "PreflightError",
    "RolloutBusy",
    "SchedulerUnfit",
    "SwapError",
    "VersionMismatch",
    "WorkerStartError",
    "suggest",
]


def suggest(wrong: str, allowed: Iterable[str]) -> str:
    """End a message about an unknown name: the closest allowed one, or all of them.

    Parameters
    ----------
    wrong
        What the user wrote.
    allowed
        What could have been written.

    Returns
    -------
    str
        ``"did you mean 'x'? Allowed: …"`` or ``"allowed: …"``.

    Examples
    --------
    >>> suggest("autocpu", ["auto-cpu", "auto-gpu"])
    "did you mean 'auto-cpu'? Allowed: auto-cpu, auto-gpu"
    >>> suggest("x", ["auto-cpu", "auto-gpu"])
    'allowed: auto-cpu, auto-gpu'
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(wrong, names, n=1)
    listed = ", ".join(names) if names else "none"
    return f"did you mean {close[0]!r}? Allowed: {listed}" if close else f"allowed: {listed}"


def one_line(error: BaseException) -> str:
    """Return what an error says in one line, or its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def _rebuild(cls: type[AgentClusterError], args: tuple[Any, ...], state: dict[str, Any]) -> AgentClusterError:
    # `cls.__new__` is that of the first builtin in the order of bases, which an OSError's memory does not fit.
    builtin = OSError if issubclass(cls, OSError) else Exception
    error: Any = builtin.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return typing.cast(AgentClusterError, error)


class AgentClusterError(Exception):
    """Base of every error of this package."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class ConfigError(AgentClusterError, ValueError):
    """A value that the user gave cannot be used.

    Parameters
    ----------
    message
        The whole sentence: the value, the place it was given, the remedy.
    key
        The name of the option as the user typed it, when there is one.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class ModeRefused(ConfigError):
    """A node cannot serve a mode.

    Parameters
    ----------
    node
        Name of the node.
    mode
        Name of the mode.
    reason
        Why, and what would help.
    """

    def __init__(self, node: str, mode: str, reason: str) -> None:
        super().__init__(f"node {node!r} cannot serve mode {mode!r}: {reason}")
        self.node = node
        self.mode = mode
        self.reason = reason


class PreflightError(AgentClusterError, ValueError):
    """A change was refused before anything was touched.

    Parameters
    ----------
    mode
        Name of the mode that was asked for.
    refusals
        Node name -> reason, for every node that refused.
    """

    def __init__(self, mode: str, refusals: Mapping[str, str]) -> None:
        reasons = "; ".join(f"{node}: {reason}" for node, reason in refusals.items())
        super().__init__(f"cannot reprovision to {mode!r}, nothing was changed: {reasons}")
        self.mode = mode
        self.refusals = dict(refusals)


class NodeNotFound(AgentClusterError, LookupError):
    """No node of that name is in the cluster."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.known = sorted(known)
        super().__init__(f"no node named {name!r}; {suggest(name, self.known)}")


class NodeExists(AgentClusterError, ValueError):
    """A node of that name is already registered by another agent."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        super().__init__(
            f"a node named {name!r} is already registered by the agent at {address}; "
            f"give this one another name (Host(..., name=…) or dask-agent --name)"
        )


class LaunchError(AgentClusterError, RuntimeError):
    """An agent (or a scheduler) did not come to run on a host.

    Parameters
    ----------
    host
        The host as the user wrote it.
    reason
        What happened, and the remedy where one is known.
    last_output
        Last line that the process wrote, if it wrote any.
    """

    def __init__(self, host: str, reason: str, last_output: str = "") -> None:
        said = f'; last output: "{last_output}"' if last_output else ""
        super().__init__(f"agent on {host} did not start: {reason}{said}")
        self.host = host
        self.reason = reason
        self.last_output = last_output


class LaunchTimeout(LaunchError, TimeoutError):
    """An agent said nothing within the launch deadline."""


class WorkerStartError(AgentClusterError, RuntimeError):
    """An agent could not start one or more workers.

    Parameters
    ----------
    node
        Name of the node.
    failures
        Worker name -> what it said last.
    """

    def __init__(self, node: str, failures: Mapping[str, str]) -> None:
        each = "; ".join(f"{name}: {why}" for name, why in failures.items())
        super().__init__(f"workers on node {node!r} did not start: {each}")
        self.node = node
        self.failures = dict(failures)


class SwapError(AgentClusterError, RuntimeError):
    """A swap did not end as asked.

    Parameters
    ----------
    reason
        What failed on which node.
    state
        What is true of the workers now.
    report
        What was done on each node, as ``reprovision_nodes`` would have answered; None when nothing was begun.
    """

    def __init__(self, reason: str, state: str, report: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{reason}; {state}")
        self.reason = reason
        self.state = state
        self.report = report


class RolloutBusy(AgentClusterError, RuntimeError):
    """Another rollout runs, and the caller did not want to wait for it (any longer).

    Parameters
    ----------
    label
        The mode that the other one goes to.
    seconds
        How long it has run.
    """

    def __init__(self, label: str, seconds: float) -> None:
        super().__init__(
            f"a rollout to {label!r} has run for {seconds:.0f} s; "
            f"wait=True waits for it, cluster.rollout.cancel() ends it"
        )
        self.label = label
        self.seconds = seconds


class SchedulerUnfit(AgentClusterError, RuntimeError):
    """The scheduler cannot run agentcluster's plugin."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"scheduler at {address} cannot hold nodes: {reason}")
        self.address = address
        self.reason = reason


class VersionMismatch(ConfigError):
    """Two processes speak different versions of agentcluster's protocol.

    Parameters
    ----------
    message
        The whole sentence: both processes with their versions, and which to upgrade.
    """
