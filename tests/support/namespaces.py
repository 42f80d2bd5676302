"""Hosts on one machine: network namespaces on a bridge, and processes in them.

``python -m tests.support.namespaces ADDRESS PORT …`` is the stranger: it becomes the user `nobody`, knocks at each port
in the ways that a port of ours could answer, and prints what came back, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import ssl
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]

NOBODY = 65534

#: Seconds that a port may take for an answer to a stranger.
PATIENCE = 1.0

#: What a stranger sends: nothing, a request of HTTP, the beginning of a handshake with an agent in standby.
KNOCKS = {
    "silence": b"",
    "http": b"GET /info/main/workers.html HTTP/1.0\r\n\r\n",
    "handshake": b'{"protocol":1,"version":"1","nonce":"n"}\n',
}


class NoNamespaces(Exception):
    """Network namespaces cannot be made here."""


@dataclass
class Network:
    """Hosts by name, each a network namespace with one address.

    Attributes
    ----------
    hosts
        Name -> address.
    """

    prefix: str
    hosts: dict[str, str] = field(default_factory=dict)

    def inside(self, host: str, *command: str) -> list[str]:
        """Return a command that runs in a host."""
        return ["ip", "netns", "exec", f"{self.prefix}-{host}", *command]

    def output(self, host: str, *command: str) -> str:
        """Return what a command prints that runs in a host."""
        done = subprocess.run(self.inside(host, *command), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def listening(self, host: str) -> set[tuple[str, int]]:
        """Return the addresses and ports at which something listens in a host."""
        found = set()
        for line in self.output(host, "ss", "-Hltn").splitlines():
            address, _, port = line.split()[3].rpartition(":")
            found.add((address.strip("[]"), int(port)))
        return found

    def knock(self, host: str, address: str, ports: Sequence[int]) -> dict[int, str]:
        """Return what a stranger in a host gets from ports at an address."""
        if not ports:
            return {}
        code = (sys.executable, "-m", "tests.support.namespaces", address, *map(str, ports))
        answers = json.loads(self.output(host, "env", f"PYTHONPATH={ROOT}", *code))
        return {int(port): str(answer) for port, answer in answers.items()}


@contextlib.contextmanager
def network(*names: str) -> Iterator[Network]:
    """Make hosts on one bridge, and remove them at the end."""
    prefix = f"agc{uuid.uuid4().hex[:5]}"
    made = Network(prefix)

    def run(line: str) -> None:
        done = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise NoNamespaces(f"{line}: {done.stderr.strip()}")

    spaces = []
    try:
        for name in ("net", *names):
            run(f"ip netns add {prefix}-{name}")
            spaces.append(f"{prefix}-{name}")
            run(f"ip -n {prefix}-{name} link set lo up")
        run(f"ip -n {prefix}-net link add bridge type bridge")
        run(f"ip -n {prefix}-net link set bridge up")
        for number, name in enumerate(names, 1):
            run(f"ip -n {prefix}-net link add v{number} type veth peer name eth0 netns {prefix}-{name}")
            run(f"ip -n {prefix}-net link set v{number} master bridge up")
            run(f"ip -n {prefix}-{name} address add 10.77.0.{number}/24 dev eth0")
            run(f"ip -n {prefix}-{name} link set eth0 up")
            run(f"ip -n {prefix}-{name} route add default via 10.77.0.254")  # dask looks which address leads out
            made.hosts[name] = f"10.77.0.{number}"
        yield made
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], check=False, timeout=30)


# -- the stranger ------------------------------------------------------------------------------------------------------


def knock(address: str, port: int) -> str:
    """Return what a port answers: ``unreachable``, ``refused``, or what it said."""
    said = []
    for name, data in KNOCKS.items():
        answer = _plain(address, port, data)
        if answer is None:
            return "unreachable"
        if answer:
            said.append(f"{name}: {_kind(answer)}")
    if answer := _tls(address, port):
        said.append(f"tls: {_kind(answer)}")
    return "; ".join(said) or "refused"


def _plain(address: str, port: int, data: bytes) -> bytes | None:
    try:
        with socket.create_connection((address, port), timeout=PATIENCE) as connection:
            connection.sendall(data)
            return _answer(connection)
    except ConnectionRefusedError:
        return None
    except OSError:
        return b""


def _tls(address: str, port: int) -> bytes:
    """Return what is said after a handshake without a certificate, or with one of another CA's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((address, port), timeout=PATIENCE) as connection,
            context.wrap_socket(connection) as encrypted,
        ):
            encrypted.sendall(KNOCKS["handshake"])
            return _answer(encrypted)
    except OSError:
        return b""


def _answer(connection: socket.socket) -> bytes:
    try:
        data = connection.recv(4096)
    except (TimeoutError, OSError):
        return b""
    return b"" if data[:1] == b"\x15" else data  # an alert of TLS is a refusal


def _kind(answer: bytes) -> str:
    if answer.startswith(b"HTTP/"):
        return answer.split(b"\r\n")[0].decode()
    if answer.startswith(b"{"):
        return "a challenge"
    return "SSH" if answer.startswith(b"SSH-") else "dask" if b"pickle-protocol" in answer else repr(answer[:20])


def main(address: str, *ports: str) -> None:
    """Become another user, and knock."""
    socket.getaddrinfo("localhost", 0)  # imports what that user may not read
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    with ThreadPoolExecutor(len(ports)) as pool:
        answers = pool.map(lambda port: knock(address, int(port)), ports)
        print(json.dumps(dict(zip(ports, answers, strict=True))))


if __name__ == "__main__":
    main(*sys.argv[1:])
