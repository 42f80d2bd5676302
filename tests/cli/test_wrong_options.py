"""Wrong texts for every option of every command: each is refused in one sentence, and nothing is begun.

The options come from click's commands, so that a new one is noticed: it has to be given its kind in :data:`KINDS`,
which tells the texts that are right. ``python -m tests.scenarios.test_wrong_inputs`` prints how many were refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcluster.cli import connection, dask_agent
from agentcluster.cli.main import main
from agentcluster.errors import LONGEST
from agentcluster.modes import names
from tests.support.wrong_values import TEXTS, TIME, TIME_0, Right, anything, nbytes, nothing

NOWHERE = "tcp://127.0.0.1:1"


def whole(least: int, most: float) -> Right:
    return lambda text: bool(re.fullmatch(r"\s*[+-]?\d{1,40}\s*", text)) and least <= int(text) <= most


def port(text: str) -> bool:
    return bool(re.fullmatch(r"\d{1,5}", text)) and int(text) < 65536


def address(text: str) -> bool:
    return bool(re.fullmatch(r"(tcp://|tls://)?[\w.]*:\d{1,5}", text)) and port(text.rpartition(":")[2])


def listening(text: str) -> bool:
    """Return whether dask decides of a text where it listens: then it is refused at the start, with its reason."""
    return True


def not_given(right: Right) -> Right:
    """Return a kind for which an empty text is the same as none, as in ``dask worker``."""
    return lambda text: text == "" or right(text)


def node_name(text: str) -> bool:
    return bool(text.strip()) and text.isprintable() and len(text) <= 253


def dashboard(text: str) -> bool:
    # A host may be anything, and several are written with commas.
    of, _, number = text.rpartition(":")
    return text.isprintable() and len(text) <= 253 and (port(number) if of or number.isdecimal() else ":" not in text)


CONNECTION: dict[str, Right] = {
    "scheduler": lambda text: address(text) and not text.endswith(":0"),
    "scheduler_file": nothing,
    "credentials": nothing,
    "tls_ca_file": nothing,
    "tls_cert": nothing,
    "tls_key": nothing,
}
COUNT = whole(0, 2**62)
NODES: Right = lambda text: bool(text.strip(", ")) and text != "\udcff"  # noqa: E731

#: Command -> its options and arguments that take a value -> the texts that are right, or may be.
KINDS: dict[str, dict[str, Right]] = {
    "nodes": CONNECTION,
    "reprovision": {
        **CONNECTION,
        "mode": lambda text: text in names(),
        "config": lambda text: text == "null",
        "options": nothing,
        "nodes": NODES,
        "strategy": nothing,
        "drain": nothing,
        "drain_timeout": TIME_0,
        "bound": nothing,
        "max_parallel": whole(1, 2**62),
        "on_failure": nothing,
        "timeout": TIME,
    },
    "scale": {
        **CONNECTION,
        "n": COUNT,
        "cores": COUNT,
        "memory": lambda text: nbytes(text) and not re.search(r"\d{20}", text),
        "on_nodes": COUNT,
        "kind": nothing,
        "nodes": NODES,
    },
    "logs": {**CONNECTION, "names": NODES, "lines": whole(0, 10**40)},
    "events": CONNECTION,
    "top": {
        **CONNECTION,
        "interval": lambda text: TIME(text) and not re.fullmatch(r"\s*0?\.0\d*s?\s*", text),
        "iterations": whole(1, 10**40),
    },
    # A folder may have any name, also that of a number; in the tests none of them can be made.
    "credentials": {"folder": anything, "days": whole(1, 3650)},
    "demo": {"hosts": whole(1, 16)},
    "dask-agent": {
        "scheduler": CONNECTION["scheduler"],
        "scheduler_file": lambda text: len(text) != 1,  # each takes a while
        "credentials": nothing,
        "tls_ca_file": nothing,
        "tls_cert": nothing,
        "tls_key": nothing,
        "mode": lambda text: text in names(),
        "mode_config": nothing,
        "spec": nothing,
        "spec_file": nothing,
        "n_workers": lambda text: whole(-10_000, 10_000)(text) and int(text) != 0,
        "nthreads": whole(1, 10**6),
        "memory_limit": lambda text: text == "0" or whole(2**20, 2**62)(text),
        "worker_class": nothing,
        "worker_port": not_given(port),
        "nanny_port": not_given(port),
        "dashboard_address": dashboard,
        "contact_address": not_given(address),
        "listen_address": address,
        "host": listening,
        "interface": listening,
        "protocol": listening,
        "name": node_name,
        "labels": lambda text: text in ("a=", "gpu=²", "gpu=1.5", "GPU=-1", "GPU=nan"),
        "resources": lambda text: not text.strip(", ") or text in ("gpu=1.5",),
        "death_timeout": not_given(TIME),
        "lifetime": not_given(TIME_0),
        "lifetime_stagger": not_given(TIME_0),
        "preload": lambda text: text == " ",  # a program, of nothing
        "preload_argv": lambda text: not text or not text.isprintable(),  # they are in dask's message as they are
        # Imported, or used, by the workers alone.
        "preload_nanny": anything,
        "scheduler_sni": anything,
        "local_directory": anything,
        "pid_file": anything,
        # Without effect in `dask worker` too.
        "dashboard_prefix": anything,
    },
}

#: Command -> other words of its command line.
OTHERS: dict[str, list[str]] = {
    "reprovision": ["uniform"],
    "credentials": ["/proc/none"],
    "dask-agent": [NOWHERE],
}
#: Parameters without which another is not looked at, or which it takes the place of -> the words.
WITH: dict[tuple[str, str], list[str]] = {
    ("dask-agent", "contact_address"): ["--listen-address", "tcp://127.0.0.1:7777", NOWHERE],
    ("dask-agent", "scheduler_file"): ["--death-timeout", "0.001"],  # it is waited for
    **{("dask-agent", each): ["tls://127.0.0.1:1"] for each in ("tls_ca_file", "tls_cert", "tls_key")},
    ("dask-agent", "mode_config"): ["--mode", "uniform", NOWHERE],
}


def commands() -> dict[str, click.Command]:
    return {**main.commands, "dask-agent": dask_agent.main}


def takes_a_value(parameter: click.Parameter) -> bool:
    return not (isinstance(parameter, click.Option) and parameter.is_flag)


def test_every_option_has_its_kind() -> None:
    assert commands().keys() == KINDS.keys()
    for command, found in commands().items():
        assert {each.name for each in found.params if takes_a_value(each)} == KINDS[command].keys(), command


def line(command: str, parameter: click.Parameter, text: str) -> list[str]:
    """Return a command line that gives a parameter a text."""
    words = list(WITH.get((command, str(parameter.name)), OTHERS.get(command, [])))
    if parameter.name != "scheduler" and KINDS[command].keys() >= CONNECTION.keys() and command != "dask-agent":
        words = ["--scheduler", NOWHERE, *words]
    if isinstance(parameter, click.Option):
        return [f"{parameter.opts[-1]}={text}", *words]
    replaced = OTHERS.get(command) if parameter.name in ("mode", "scheduler", "folder") else []
    return [*(word for word in words if word not in (replaced or [])), "--", text]


class Begun(Exception):
    """A command has looked for a scheduler, or would start something."""


def invoke(command: str, words: list[str]) -> Result:
    """Run a command in this process; what it would begin is an exception."""

    def begin(*args: object, **kwargs: object) -> None:
        raise Begun

    class Scheduler:
        def __init__(self, *args: object, **kwargs: object) -> None: ...

        def __getattr__(self, call: str) -> Callable[..., object]:
            return begin

        async def close_rpc(self) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "rpc", Scheduler)
        patch.setattr("agentcluster.cli.main._demo", begin)
        for each in ("log_to_stderr", "quiet_ends", "enable_proctitle_on_current", "enable_proctitle_on_children"):
            patch.setattr(dask_agent, each, lambda: None)
        patch.setattr(dask_agent, "_run", lambda *args: None)
        patch.setattr(dask_agent, "asyncio_run", begin)
        return CliRunner().invoke(commands()[command], words, env={"DASK_SCHEDULER_ADDRESS": ""})


def tried(command: str, parameter: click.Parameter, text: str) -> str:
    """Give a parameter a wrong text; return the sentence, and fail where it is not as it should be."""
    result = invoke(command, line(command, parameter, text))
    about = (command, parameter.name, text[:80])
    assert not isinstance(result.exception, Begun), about
    assert isinstance(result.exception, SystemExit), (about, result.exception)
    said = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else ""
    # As `dask worker`: 2 where click refuses it, 1 where the command does.
    by_command = command == "dask-agent" and "Usage:" not in result.stderr
    assert result.exit_code == (1 if by_command else 2), (about, result.output)
    assert said.startswith(("Error: ", "agentcluster", "dask-agent: ")), (about, said)
    assert "Traceback" not in result.output, about
    assert len(said) < LONGEST + 100 or said.startswith("Error: "), about  # click shows the whole value
    assert not result.stdout, about
    words = (str(parameter.name), str(parameter.metavar), *(each.lstrip("-") for each in parameter.opts))
    named = any(each.replace("_", "-") in said.replace("_", "-") for each in words)
    parts = (text[:20], *text.split("="), repr(text)[1:20], ascii(text)[1:20])
    assert named or any(part in said for part in parts if part) or "no scheduler" in said, (about, said)
    return said


def wrong(texts: list[str], only: Collection[str]) -> Iterator[tuple[str, click.Parameter, str]]:
    for command, parameter in parameters():
        if command not in only:
            continue
        right = KINDS[command][str(parameter.name)]
        yield from ((command, parameter, text) for text in texts if not right(text))


def parameters() -> list[tuple[str, click.Parameter]]:
    """Return the options and arguments with a value; those that name a scheduler are the same for all commands."""
    return [
        (command, each)
        for command, found in commands().items()
        for each in found.params
        if takes_a_value(each) and (command in ("nodes", "dask-agent") or each.name not in CONNECTION)
    ]


def run(texts: list[str], *only: str) -> Counter[str]:
    """Give each parameter of some commands, or of all, each wrong text; return how many each command refused."""
    return Counter(command for command, *rest in wrong(texts, only or KINDS) if tried(command, *rest))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no text name a file, or make one."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", KINDS)
def test_a_command_refuses_wrong_texts_and_begins_nothing(command: str, tmp_path: Path) -> None:
    run(TEXTS, command)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=100)
@given(
    st.sampled_from([each for each in parameters() if each[1].name not in ("preload", "worker_class")]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
)
def test_a_command_refuses_whatever_is_wrong(parameter: tuple[str, click.Parameter], text: str) -> None:
    command, each = parameter
    if not KINDS[command][str(each.name)](text):
        tried(command, each, text)
