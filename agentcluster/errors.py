"""Exceptions of agentcluster, in one tree.

::

    AgentClusterError
    ├── ConfigError (ValueError)         a value cannot be used: the value, its place, what is allowed
    │   ├── ModeRefused                  a node cannot serve a mode: the node, the reason
    │   └── VersionMismatch              two processes have different versions of the protocol
    ├── PreflightError (ValueError)      one or more nodes refused; nothing was changed
    ├── NodeNotFound (LookupError)       no node of that name
    ├── NodeExists (ValueError)          a node of that name is already registered
    ├── LaunchError (RuntimeError)       an agent did not start on a host
    │   └── LaunchTimeout (TimeoutError)
    ├── WorkerStartError (RuntimeError)  an agent could not start a worker
    │   └── WorkerStartTimeout (TimeoutError)
    ├── SwapError (RuntimeError)         a swap failed; has the state of the workers
    ├── RolloutBusy (RuntimeError)       another rollout runs
    └── SchedulerUnfit (RuntimeError)    the scheduler cannot run agentcluster's plugin

Each stores its facts as attributes, has a message of one sentence, and can be pickled (also with the keyword arguments
of its constructor), because most of them travel from the scheduler to a client.

Users are shown the sentence and their own line: the calls that they make drop the frames behind them, see
:func:`in_short`, and IPython asks the error itself. ``agentcluster.debug: true`` in dask's configuration shows all.
"""

from __future__ import annotations

import difflib
import linecache
import traceback
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

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
    "WorkerStartTimeout",
    "suggest",
]

#: Number of names above which a message with a close one does not list them all.
MANY = 16


def suggest(wrong: str, allowed: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the closest allowed name, and all of them.

    Parameters
    ----------
    wrong
        Name that the user wrote.
    allowed
        Allowed names.

    Returns
    -------
    str
        ``"did you mean 'x'? Allowed: …"`` or ``"allowed: …"``; without the allowed names where they are many, and one
        is close.

    Examples
    --------
    >>> suggest("autocpu", ["auto-cpu", "auto-gpu"])
    "did you mean 'auto-cpu'? Allowed: auto-cpu, auto-gpu"
    >>> suggest("x", ["auto-cpu", "auto-gpu"])
    'allowed: auto-cpu, auto-gpu'
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(wrong, names, n=1) or [name for name in names if wrong and wrong in name]
    if close and len(names) > MANY:
        return f"did you mean {close[0]!r}?"
    listed = ", ".join(names) if names else "none"
    return f"did you mean {close[0]!r}? Allowed: {listed}" if close else f"allowed: {listed}"


def by_reason(why: Iterable[tuple[str, str]], most: int | None = None) -> list[str]:
    """Return each reason once, after the names of the nodes that have it.

    Parameters
    ----------
    why
        Name of a node, and its reason.
    most
        Greatest number of nodes that are named with one reason; the others are counted.

    Examples
    --------
    >>> by_reason([("a", "it is lost"), ("b", "no GPU"), ("c", "it is lost")])
    ['a, c: it is lost', 'b: no GPU']
    """
    nodes: dict[str, list[str]] = {}
    for node, reason in why:
        nodes.setdefault(reason, []).append(node)
    return [f"{_listed(names, most)}: {reason}" for reason, names in nodes.items()]


def _listed(names: list[str], most: int | None) -> str:
    more = "" if most is None or len(names) <= most else f" and {len(names) - most} more"
    return f"{', '.join(names[:most])}{more}"


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line.

    Parameters
    ----------
    error
        The error.

    Returns
    -------
    str
        The message; the name of the error's class when it has none.
    """
    return " ".join(str(error).split()) or type(error).__name__


#: Characters of the longest message; dask cannot send one of 10,000, and names in it may come from anybody.
LONGEST = 8000


def printable(text: str) -> str:
    """Return a text that other machines may have written, without what a terminal or a log takes for a command.

    Parameters
    ----------
    text
        The text.

    Returns
    -------
    str
        The text with each control character, also a line's end, as its escape, such as ``\\x1b``.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode("ascii") for c in text)


def _rebuild(cls: type[AgentClusterError], args: tuple[object, ...], state: dict[str, object]) -> AgentClusterError:
    """Make an error without calling its constructor."""
    # `cls.__new__` is that of the first builtin base, which does not fit the memory layout of an OSError.
    builtin = OSError if issubclass(cls, OSError) else Exception
    error = builtin.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class AgentClusterError(Exception):
    """Base of all errors of this package.

    Their messages have no control characters, whoever wrote the names and reasons in them.
    """

    def __str__(self) -> str:
        text = printable(super().__str__())
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows: the sentence, the user's line, and a cause of the user's own."""
        if debugging():
            raise NotImplementedError  # IPython then shows its own traceback
        return [f"{type(self).__name__}: {self}", *_users_line(self), *_cause(self)]


class ConfigError(AgentClusterError, ValueError):
    """A value cannot be used.

    Parameters
    ----------
    message
        The whole sentence: the value, its place, what is allowed.
    key
        Name of the option as the user typed it, if there is one.
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
        The reason, and the remedy.
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
        Name of the requested mode.
    refusals
        Node name -> reason, for every node that refused.
    """

    def __init__(self, mode: str, refusals: Mapping[str, str]) -> None:
        reasons = "; ".join(by_reason(refusals.items()))
        what = "stop the workers" if mode == "none" else f"reprovision to {mode!r}"
        super().__init__(f"cannot {what}, nothing was changed: {reasons}")
        self.mode = mode
        self.refusals = dict(refusals)


class NodeNotFound(AgentClusterError, LookupError):
    """No node of that name is in the cluster.

    Parameters
    ----------
    name
        The unknown name; or a pattern, or a label, that no node has.
    known
        Names of the nodes.
    labels
        Labels of the nodes.
    """

    def __init__(self, name: str, known: Iterable[str], labels: Iterable[str] = ()) -> None:
        self.name = name
        self.known = sorted(known)
        if "=" in str(name):
            said = f"no node has the label {name!r}; labels: {', '.join(sorted(labels)) or 'none'}"
        elif set("*?[") & set(str(name)):
            said = f"no node has a name like {name!r}; nodes: {', '.join(self.known) or 'none'}"
        else:
            said = f"no node named {name!r}; {suggest(str(name), self.known)}"
        super().__init__(said)


class NodeExists(AgentClusterError, ValueError):
    """A node of that name is already registered by another agent.

    Parameters
    ----------
    name
        The name.
    address
        Address of the other agent.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        super().__init__(
            f"a node named {name!r} is already registered by the agent at {address}; "
            f"give this one another name (Host(..., name=…) or dask-agent --name)"
        )


class LaunchError(AgentClusterError, RuntimeError):
    """An agent (or a scheduler) did not start on a host.

    Parameters
    ----------
    host
        The host as the user wrote it.
    reason
        The reason, and the remedy where one is known.
    last_output
        Last line that the process printed, if any.
    what
        What did not start: ``agent`` or ``scheduler``.
    """

    def __init__(self, host: str, reason: str, last_output: str = "", what: str = "agent") -> None:
        reason, last_output = printable(reason), printable(last_output)
        said = f'; last output: "{last_output}"' if last_output else ""
        super().__init__(f"{what} on {host} did not start: {reason}{said}")
        self.host = host
        self.reason = reason
        self.last_output = last_output


class LaunchTimeout(LaunchError, TimeoutError):
    """An agent was not ready within the launch timeout."""


#: Reason why a worker did not start: a text, or a mapping of the text (``why``) and a pickled exception (``raised``).
Failure: TypeAlias = str | Mapping[str, Any]


class WorkerStartError(AgentClusterError, RuntimeError):
    """An agent could not start one or more workers.

    Parameters
    ----------
    node
        Name of the node.
    failures
        Worker name -> the reason, see :data:`Failure`.

    Attributes
    ----------
    raised
        Worker name -> the exception of the worker's own code, pickled; :func:`agentcluster.wire.with_cause` makes one
        the cause of this error.
    """

    def __init__(self, node: str, failures: Mapping[str, Failure]) -> None:
        whys = {name: each if isinstance(each, str) else str(each["why"]) for name, each in failures.items()}
        each = "; ".join(f"{name}: {why}" for name, why in whys.items())
        super().__init__(f"workers on node {node!r} did not start: {each}")
        self.node = node
        self.failures = whys
        self.raised = {name: each["raised"] for name, each in failures.items() if not isinstance(each, str)}

    def answer(self) -> dict[str, Failure]:
        """Return the failures as plain data, with the exceptions."""
        return {
            name: {"why": why, "raised": self.raised[name]} if name in self.raised else why
            for name, why in self.failures.items()
        }


class WorkerStartTimeout(WorkerStartError, TimeoutError):
    """Workers had not joined the scheduler within the time that a start may take."""


class SwapError(AgentClusterError, RuntimeError):
    """A swap failed.

    Parameters
    ----------
    reason
        The failure, and the node.
    state
        State of the workers now.
    report
        Report on each node, as the answer of ``reprovision_nodes``; None when nothing was begun.

    Attributes
    ----------
    raised
        As for :class:`WorkerStartError`, where workers did not start.
    """

    def __init__(self, reason: str, state: str, report: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{reason}; {state}")
        self.reason = reason
        self.state = state
        self.report = report
        self.raised: Mapping[str, Any] = {}


class RolloutBusy(AgentClusterError, RuntimeError):
    """Another rollout runs, and the caller does not wait for it, or its wait has timed out.

    Parameters
    ----------
    label
        Mode of the other rollout.
    seconds
        Seconds since it began.
    """

    def __init__(self, label: str, seconds: float) -> None:
        super().__init__(
            f"a rollout to {label!r} has run for {seconds:.0f} s; "
            f"wait=True waits for it, cluster.rollout.cancel() ends it"
        )
        self.label = label
        self.seconds = seconds


class SchedulerUnfit(AgentClusterError, RuntimeError):
    """The scheduler cannot run agentcluster's plugin.

    Parameters
    ----------
    address
        Address of the scheduler.
    reason
        The reason, and the remedy.
    """

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"scheduler at {address} cannot hold nodes: {reason}")
        self.address = address
        self.reason = reason


class VersionMismatch(ConfigError):
    """Two processes have different versions of agentcluster's protocol.

    Parameters
    ----------
    message
        The whole sentence: both processes with their versions, and the one to upgrade.
    """


# -- how they are shown ------------------------------------------------------------------------------------------------

#: Packages whose frames, and whose errors as causes, say nothing to a user.
MACHINERY = frozenset(
    {"agentcluster", "distributed", "dask", "tornado", "asyncio", "concurrent", "asyncssh", "IPython"}
    | {"functools", "contextlib"}
)


def debugging() -> bool:
    """Return whether errors are shown with all their frames, by ``agentcluster.debug`` in dask's configuration."""
    import dask.config  # heavy, and errors are imported everywhere

    return bool(dask.config.get("agentcluster.debug", False))


def in_short(error: AgentClusterError) -> AgentClusterError:
    """Drop the frames behind an error that is about to be raised to a user, and causes that are no code of his.

    What a worker's own code has raised stays.

    Parameters
    ----------
    error
        The error.

    Returns
    -------
    AgentClusterError
        The same error.
    """
    if debugging():
        return error
    if not _is_users(error.__cause__) and not getattr(error, "raised", None):
        error.__cause__ = None
    return error.with_traceback(None)


def _is_users(error: BaseException | None) -> bool:
    """Return whether an error is of a class that the user, or a library of his, has defined."""
    return error is not None and _package(type(error).__module__) not in MACHINERY | {"builtins", "socket", "ssl"}


def _package(module: str) -> str:
    return module.partition(".")[0]


def _users_line(error: BaseException) -> list[str]:
    """Return the place of the innermost frame that is the user's, and its line."""
    frames = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if _package(str(frame.f_globals.get("__name__", ""))) not in MACHINERY
    ]
    if not frames:
        return []
    frame, number = frames[-1]
    file = frame.f_code.co_filename
    text = linecache.getline(file, number).strip()
    place = "the cell" if "ipykernel" in file or file.startswith("<ipython") else file
    return [f"  line {number} of {place}:", f"    {text}"]


def _cause(error: BaseException) -> list[str]:
    cause = error.__cause__
    return [f"because of {type(cause).__name__}: {cause}"] if _is_users(cause) else []
