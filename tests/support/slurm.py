"""A real Slurm of one node for tests: munge, controller and node daemon, on loopback, below a temporary folder.

They are Debian's ``munge`` and ``slurm-wlm``, started in the foreground with ports, a key, a socket and a state of
their own, so a Slurm that the machine has already is neither asked nor touched. Cgroups are not used: processes of a
job are found by their process group, also when the job's shell, which is their parent, ended first. The node claims
more cores than the machine has, so that tests do not wait for each other's jobs.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.waiting import wait_blocking

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue", "srun")

#: Seconds that a daemon has to be ready, and to end.
DEADLINE = 30

CONFIGURATION = """\
ClusterName=agentcluster-tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=0
KillWait=30
MessageTimeout=60
TCPTimeout=30
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=65536
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why there can be no Slurm here, or None."""
    absent = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurm-wlm, munge)"
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


def host() -> str:
    """Return the name that the node and its controller have, which must be the machine's own."""
    return socket.gethostname().partition(".")[0]


@dataclass(frozen=True)
class Slurm:
    """A Slurm that runs.

    Attributes
    ----------
    directory
        All that its daemons keep, and their logs.
    environ
        What its commands need in their environment to talk to it.
    """

    directory: Path
    environ: dict[str, str]

    def run(self, *command: str, timeout: float = 60) -> str:
        """Return what one of its commands writes."""
        done = subprocess.run(
            command,
            env=os.environ | self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """Return the jobs that are not over, by id: their state and when they started."""
        lines = self.run("squeue", "--noheader", "--format=%i %T %S").splitlines()
        return {number: said for number, _, said in (line.partition(" ") for line in lines)}

    def pids(self, job: str) -> set[int]:
        """Return the processes of a job, which are those that have its number in their environment."""
        return {process.pid for process in self._processes() if _environ(process).get("SLURM_JOB_ID") == job}

    def empty(self) -> None:
        """Cancel all jobs and wait until their processes are gone."""
        for job in self.jobs():
            self.run("scancel", job)
        wait_blocking(lambda: not self.jobs(), 2 * DEADLINE)
        wait_blocking(lambda: not [each for each in self._processes() if each.name() == "slurmstepd"], DEADLINE)

    def kill(self) -> list[psutil.Process]:
        """Kill all that still has to do with it, and return it."""
        left = list(self._processes())
        for process in left:
            process.kill()
        return left

    def _processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            if process.pid != os.getpid() and _environ(process).get("SLURM_CONF") == self.environ["SLURM_CONF"]:
                yield process


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


@contextmanager
def serve() -> Iterator[Slurm]:
    """Run a Slurm until the block ends."""
    # A socket's path must be short, and pytest's folders are long.
    with tempfile.TemporaryDirectory(prefix="agentcluster-slurm-", dir="/tmp") as name:
        directory = Path(name)
        slurm = Slurm(directory, {"SLURM_CONF": str(directory / "slurm.conf")})
        try:
            with ExitStack() as daemons:
                _start(slurm, daemons)
                yield slurm
                slurm.empty()
        finally:
            left = slurm.kill()
        assert not left, left


def _start(slurm: Slurm, daemons: ExitStack) -> None:
    for name in ("state", "spool"):
        (slurm.directory / name).mkdir()
    key = slurm.directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    munge = (
        # --force: it wants a folder for its socket that every user may enter
        *("munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}"),
        f"--socket={slurm.directory / 'munge.socket'}",
        *(f"--{each}-file={slurm.directory / f'munged.{each}'}" for each in ("pid", "log", "seed")),
    )
    daemons.enter_context(_daemon(slurm, *munge))
    wait_blocking((slurm.directory / "munge.socket").exists, DEADLINE)
    for attempt in range(3):
        if _start_slurm(slurm, daemons):
            return
        print(f"Slurm did not start, attempt {attempt + 1}: {logs(slurm)}")
    raise AssertionError(f"Slurm does not start: {logs(slurm)}")


def _start_slurm(slurm: Slurm, daemons: ExitStack) -> bool:
    """Start both daemons on free ports; return whether the node is ready, and not its port taken meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        ports = {"controller_port": a.getsockname()[1], "node_port": b.getsockname()[1]}
    file = slurm.environ["SLURM_CONF"]
    Path(file).write_text(CONFIGURATION.format(host=host(), directory=slurm.directory, **ports))
    with ExitStack() as these:
        running = [these.enter_context(_daemon(slurm, name, "-D", "-f", file)) for name in ("slurmctld", "slurmd")]
        deadline = time.monotonic() + DEADLINE
        while all(daemon.poll() is None for daemon in running) and time.monotonic() < deadline:
            asked = subprocess.run(
                ["sinfo", "--noheader", "--format=%T"],
                env=os.environ | slurm.environ,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=DEADLINE,
            )
            if asked.stdout.split() == ["idle"]:
                daemons.push(these.pop_all())
                return True
            time.sleep(0.1)
    return False


@contextmanager
def _daemon(slurm: Slurm, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    program = shutil.which(command[0], path=PATH)
    assert program is not None
    with (slurm.directory / f"{command[0]}.out").open("ab") as log:
        popen = subprocess.Popen(
            [program, *command[1:]],
            env=os.environ | slurm.environ,
            cwd=slurm.directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield popen
    finally:
        popen.send_signal(signal.SIGTERM)
        try:
            popen.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait(DEADLINE)


def logs(slurm: Slurm) -> str:
    """Return what the daemons wrote."""
    return "\n".join(f"== {file.name}\n{file.read_text()}" for file in sorted(slurm.directory.glob("*.out")))
