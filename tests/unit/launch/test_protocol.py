"""The lines between a launcher and the process it starts: settings, readiness and logs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcluster.errors import ConfigError
from agentcluster.launch.protocol import MAX_LINE, LogTail, Ready, Settings, drain
from agentcluster.model import Gpu, Hardware
from agentcluster.wire import PROTOCOL

SECRET = "-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n"


def test_settings_travel_as_one_line() -> None:
    settings = Settings(
        role="scheduler",
        name="gpu-1",
        scheduler="tls://10.0.0.1:8786",
        security={"tls_client_key": SECRET, "require_encryption": True},
        config={"distributed.comm.timeouts.connect": "10s", "list": [1, {"a": None}]},
        environ={"A": "b\nc"},
        options={"standby": True, "name": "ü"},
    )
    line = settings.encode()
    assert "\n" not in line
    assert Settings.decode(line + "\n") == settings


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)


@given(options=st.dictionaries(st.text(), json_values), environ=st.dictionaries(st.text(), st.text()))
def test_settings_survive_any_content(options: dict[str, Any], environ: dict[str, str]) -> None:
    settings = Settings(options=options, environ=environ)
    line = settings.encode()
    assert line.splitlines() == [line]
    assert Settings.decode(line) == settings


def test_settings_keep_secrets_out_of_the_repr() -> None:
    shown = repr(Settings(security={"k": SECRET}, config={"password": "secret"}, environ={"TOKEN": "secret"}))
    assert "secret" not in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"protocol": 2},
            r"the cluster has agentcluster \S+ with protocol 2, .*; upgrade .* where the launched process runs",
        ),
        (
            {"protocol": None},
            r"the cluster has agentcluster \S+ with protocol None, .*; upgrade agentcluster where the cluster runs",
        ),
        ({"rôle": "agent"}, r"unknown key 'rôle'; did you mean 'role'\?"),
        ({"role": "worker"}, r"settings.role: 'worker' is not allowed; allowed: agent, scheduler"),
        ({"security": ["secret"]}, r"settings.security: expected a mapping$"),
        ({"environ": {"A": 1}}, r"settings.environ.A: expected text, got int$"),
        ({"name": 1}, r"settings.name: expected str, got 1"),
    ],
)
def test_settings_refuse(change: dict[str, Any], message: str) -> None:
    line = json.dumps({**json.loads(Settings().encode()), **change})
    with pytest.raises(ConfigError, match=message):
        Settings.decode(line)


@pytest.mark.parametrize("line", ["", "{", "[]", "null", '"x"'])
def test_settings_refuse_what_is_no_object(line: str) -> None:
    with pytest.raises(ConfigError, match=r"settings: (not JSON|expected a JSON object)"):
        Settings.decode(line)


def test_ready_is_found_behind_what_a_login_shell_prints() -> None:
    hardware = Hardware("gpu-1", 8, 2**30, gpus=(Gpu("0", "GPU-1", "H200", 2**37),), versions={"dask": "1"})
    ready = Ready("tcp://10.0.0.5:1", 42, versions={"python": "3.11"}, hardware=hardware)
    line = ready.encode()
    assert Ready.decode(line) == ready
    assert Ready.decode("Welcome! " + line + "\r") == ready
    assert Ready.decode("Welcome to agentcluster") is None
    with pytest.raises(ConfigError, match=r"the launched process has .* with protocol 7, the cluster has"):
        Ready.decode(line.replace(f'"protocol":{PROTOCOL}', '"protocol":7'))


class _Chunks:
    """A stream of given chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    async def read(self, n: int, /) -> bytes:
        return next(self._chunks, b"")


async def _tail(*chunks: bytes) -> LogTail:
    log = LogTail()
    await drain(_Chunks(iter(chunks)), log.append)
    return log


async def test_log_keeps_the_last_lines() -> None:
    log = await _tail(*(b"line %d\n" % i for i in range(5000)))
    assert log.lines() == [f"line {i}" for i in range(4000, 5000)]
    assert log.last() == "line 4999"


async def test_log_has_lines_however_they_are_cut() -> None:
    log = await _tail(b"on", b"e\r\ntw", b"o\n\n", b"thr\xff", b"ee")
    assert log.lines() == ["one", "two", "", "thr\ufffdee"]
    assert (await _tail(b"one\n \n")).last() == "one"
    assert (await _tail()).last() == ""


@pytest.mark.parametrize("size", [1000, MAX_LINE])
async def test_log_bounds_a_line_without_end(size: int) -> None:
    start = time.monotonic()
    log = await _tail(*([b"x" * size] * (10_000_000 // size)), b"\nend")
    assert time.monotonic() - start < 5
    assert max(map(len, log.lines())) == MAX_LINE
    assert sum(map(len, log.lines())) <= 4 * 2**20
    assert log.last() == "end"
