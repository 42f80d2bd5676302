"""Bytes that no process of ours sends, on each port that others can reach: none of them ends, blocks or changes it.

``python -m tests.scenarios.test_hostile_frames --seed 1 --count 100000`` sends as many as that, and prints what became
of them; the test here sends a few. Half of the inputs are noise, half are real frames with changes: an agent and a
cluster that were listened to.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client
from distributed.security import Security

from agentcluster import AgentCluster
from agentcluster.cli.credentials import write
from agentcluster.security import credentials
from tests.support.programs import AGENT, Program, Start, programs, start_scheduler
from tests.support.waiting import wait_until

#: Bytes by which the memory of a process may grow in the second half of the inputs.
GROWTH = 20 * 2**20

#: Connections at a time: as many as an agent in standby takes from one address.
AT_ONCE = 8

#: Seconds that an answer may take.
PATIENCE = 10.0

#: Seconds after which a connection that dask keeps open is left.
MOMENT = 0.1

ONE = {"nworkers": 1, "nthreads": 1, "memory_limit": "300MiB"}


@dataclass
class Target:
    """A port, and how to see that the process behind it is well.

    Attributes
    ----------
    name, port
        What it is, and where.
    program
        The process.
    well
        Makes a real call; returns what must stay as it is.
    frames
        What real peers have sent, by connection.
    closes
        Whether it must close each connection whose other end has.
    became
        What became of the inputs.
    """

    name: str
    port: int
    program: Program
    well: Callable[[], Awaitable[object]]
    frames: Sequence[bytes]
    closes: bool = False
    became: Counter[str] = field(default_factory=Counter)


# -- inputs ------------------------------------------------------------------------------------------------------------


def inputs(dice: random.Random, frames: Sequence[bytes]) -> Iterator[bytes]:
    """Yield inputs for ever."""
    while True:
        yield noise(dice)
        yield changed(dice, dice.choice(frames)) if frames else noise(dice)


def noise(dice: random.Random) -> bytes:
    """Return bytes of no meaning, or text that looks like a message."""
    kind = dice.randrange(4)
    if kind == 0:
        return dice.randbytes(dice.randrange(300))
    if kind == 1:  # small lengths, as at the beginning of a frame of dask
        return b"".join(dice.randrange(2 ** dice.choice([3, 8, 64])).to_bytes(8, "little") for _ in range(5))
    if kind == 2:
        return json.dumps(strange(dice)).encode() + dice.choice([b"", b"\n", b"\n\n", b"\x00\n"])
    return dice.choice([b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"SSH-2.0-x\r\n", b"\n" * 50, b""])


def strange(dice: random.Random, depth: int = 0) -> object:
    """Return plain data, with keys that messages have."""
    if depth == 3 or dice.random() < 0.3:
        return dice.choice([None, True, 0, -1, 1e300, 2**70, "", "\x1b[2J", "x" * 200, "tcp://127.0.0.1:1"])
    if dice.random() < 0.3:
        return [strange(dice, depth + 1) for _ in range(dice.randrange(4))]
    keys = ("protocol", "version", "nonce", "proof", "digest", "op", "scheduler", "options", "__cloudpickle__", "")
    return {dice.choice(keys): strange(dice, depth + 1) for _ in range(dice.randrange(5))}


def changed(dice: random.Random, frame: bytes) -> bytes:
    """Return a frame with a few changes."""
    data = bytearray(frame)
    for _ in range(dice.randrange(1, 5)):
        at = dice.randrange(len(data) + 1)
        match dice.randrange(4):
            case 0 if at < len(data):
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                del data[at : at + dice.randrange(20)]
            case 2:
                data[at:at] = dice.randbytes(dice.randrange(1, 9))
            case _:
                del data[at:]
    return bytes(data)


# -- sending -----------------------------------------------------------------------------------------------------------


async def attack(target: Target, count: int, seed: int) -> None:
    """Send inputs to a target, and check that it is as it was."""
    before, begin = await target.well(), rss(target)
    found = inputs(random.Random(f"{target.name} {seed}"), target.frames)
    memory = begin
    for part in (count // 2, count - count // 2):
        memory = rss(target)  # in the second half there are no first times
        some = itertools.islice(found, part)
        await asyncio.gather(*(_send_all(target, some) for _ in range(AT_ONCE)))
    assert target.program.popen.poll() is None, f"{target.name} has ended: {target.program.output()[-2000:]}"
    assert await target.well() == before, target.name
    target.became["MiB more, in all"] = (rss(target) - begin) >> 20
    target.became["MiB more, in the second half"] = (rss(target) - memory) >> 20
    assert rss(target) - memory < GROWTH, target.name


def rss(target: Target) -> int:
    return int(psutil.Process(target.program.pid).memory_info().rss)


async def _send_all(target: Target, some: Iterator[bytes]) -> None:
    for data in some:
        target.became[await _send(target.port, data, PATIENCE if target.closes else MOMENT)] += 1


async def _send(port: int, data: bytes, patience: float) -> str:
    """Send one input, and the end; return what the other side did."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(patience):
            answer = await reader.read()
        return "answered, and closed" if answer else "closed without an answer"
    except TimeoutError:
        if patience == PATIENCE:
            raise
        return "kept open"  # such as the stream of a client that has registered, as it was heard
    except OSError:  # it was closed before all was sent
        return "closed without an answer"
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


# -- targets -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def heard(port: int) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Listen between two processes: a port that passes all on to another, and what was sent there, by connection."""
    sent: list[bytes] = []

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to_it = await asyncio.open_connection("127.0.0.1", port)
        parts: list[bytes] = []
        await asyncio.gather(_copy(there, writer, []), _copy(reader, to_it, parts))
        sent.append(b"".join(parts)[:5000])

    async with await asyncio.start_server(between, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], sent


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, parts: list[bytes]) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            parts.append(data)
            writer.write(data)
        writer.close()
        await writer.wait_closed()


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


@asynccontextmanager
async def targets(start: Start, directory: Path) -> AsyncIterator[list[Target]]:
    """Start a scheduler with an agent, and an agent in standby, each with TLS and without."""
    folder = directory / "secrets"
    write(folder, days=365)
    files = ["--tls-ca-file", str(folder / "ca.pem")]
    found = []
    async with contextlib.AsyncExitStack() as stack:
        for scheme in ("tcp", "tls"):
            place = directory / scheme
            place.mkdir()
            own = [] if scheme == "tcp" else ["--credentials", str(folder)]
            tls = [] if scheme == "tcp" else _files(files, folder, "scheduler")
            program, address = await start_scheduler(start, place, *tls, "--preload", "agentcluster")
            security: Any = Security() if scheme == "tcp" else credentials(folder)
            agent = start(*AGENT, address, "--nworkers", "1", "--nthreads", "1", "--name", "n", *own)
            client = await stack.enter_async_context(Client(address, asynchronous=True, security=security))
            nodes = await wait_until(lambda client=client: _ready(client), 40)
            frames = await _calls(address) if scheme == "tcp" else []

            async def well(client: Client = client) -> object:
                async with asyncio.timeout(PATIENCE):
                    nodes = await client.scheduler.get_nodes()
                    result = await client.submit(abs, -1, pure=False)
                return result, {name: (node["state"], sorted(node["plan"])) for name, node in nodes.items()}

            found.append(Target(f"scheduler, {scheme}", port_of(address), program, well, frames))
            found.append(Target(f"agent, {scheme}", port_of(nodes["n"]["address"]), agent, well, frames))
            standing = start(*AGENT, "--standby", "--listen-address", f"{scheme}://127.0.0.1:0", *own)
            where = (await standing.says("Standing by at ", 20)).rpartition(" ")[2]

            async def adopted(where: str = where, scheme: str = scheme) -> object:
                security: Any = None if scheme == "tcp" else folder
                options: Any = {"config": ONE, "security": security, "asynchronous": True}
                quiet = {"dashboard": False, "dashboard_address": ":0"}
                async with (
                    asyncio.timeout(3 * PATIENCE),
                    AgentCluster([where], scheduler_options=quiet, **options) as cluster,
                ):
                    return len(cluster.scheduler.workers)

            lines = await _adoption(port_of(where)) if scheme == "tcp" else []
            found.append(Target(f"standby, {scheme}", port_of(where), standing, adopted, lines, closes=True))
        yield found


def _files(ca: list[str], folder: Path, role: str) -> list[str]:
    return [*ca, "--tls-cert", str(folder / f"{role}.pem"), "--tls-key", str(folder / f"{role}.key")]


async def _ready(client: Client) -> Any:
    nodes = await client.scheduler.get_nodes() if hasattr(client.scheduler, "get_nodes") else {}
    return nodes if [node["state"] for node in nodes.values()] == ["ready"] else None


async def _calls(address: str) -> list[bytes]:
    """Return what a client sends for a few calls."""
    async with heard(port_of(address)) as (port, sent):
        async with Client(f"tcp://127.0.0.1:{port}", asynchronous=True) as client:
            await client.scheduler.get_nodes()
            with contextlib.suppress(Exception):
                await client.scheduler.scale_nodes(n=1, nodes=["none"])
            with contextlib.suppress(Exception):
                await client.scheduler.reprovision_nodes(mode="soup", nodes=["n"])
        await wait_until(lambda: len(sent) >= 2)
    return sent


async def _adoption(port: int) -> list[bytes]:
    """Return what a cluster sends that adopts an agent, as far as it comes through another port."""
    async with heard(port) as (between, sent):
        with contextlib.suppress(Exception):
            await AgentCluster([f"tcp://127.0.0.1:{between}"], launch_timeout=2, asynchronous=True)
        await wait_until(lambda: sent)
    more = json.dumps({"digest": "0" * 64, "proof": "0" * 64}).encode() + b"\n{}\n"
    return [*sent, sent[0] + more]


@pytest.mark.timeout(180)
async def test_hostile_frames(start: Start, tmp_path: Path, dice: random.Random) -> None:
    async with targets(start, tmp_path) as found:
        for target in found:
            await attack(target, 60, dice.randrange(2**32))
            lines = target.program.output().splitlines()
            if target.name.startswith("standby"):
                assert len([line for line in lines if "Refused" in line]) <= 2, "one record in a while"
            assert sum(number for what, number in target.became.items() if "MiB" not in what) == 60


async def main(seed: int, count: int) -> None:
    """Send inputs to all targets, and print what became of them."""
    with tempfile.TemporaryDirectory() as name, programs(Path(name)) as start:
        async with targets(start, Path(name)) as found:
            for target in found:
                began = time.monotonic()
                await attack(target, count // len(found) + 1, seed)
                each = ", ".join(f"{what}: {number}" for what, number in sorted(target.became.items()))
                print(f"{target.name:15} {each}; {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=100_000)
    chosen = parser.parse_args()
    sys.exit(asyncio.run(main(chosen.seed, chosen.count)))
