"""Last preparation of the forkserver: work that every worker forked from it would otherwise repeat.

Imported there, by name, after the modules of the configuration; nowhere else.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from importlib import import_module

from distributed.versions import get_versions

from agentcluster.agent.logs import quiet_ends

#: Modules that a worker imports while it starts, beyond those that come with distributed.
LATE = (
    "agentcluster.agent.forkserver",
    "distributed.http.health",
    "distributed.http.prometheus",
    "distributed.http.statics",
    "distributed.http.worker",
    "distributed.nanny",
    "email.policy",
    "multiprocessing.popen_forkserver",
    "multiprocessing.synchronize",
    "tornado.platform.asyncio",
)

#: The same, where the packages that they need are installed.
OPTIONAL = ("distributed.http.worker.prometheus.core", "http.server", "numpy.random")

#: Seconds after SIGTERM or SIGINT at which a worker ends by itself.
GRACE = 30.0

_FORKSERVER = os.getpid()


def _end_later(number: int, _: object) -> None:
    """Delay the effect of a signal: the agent moves the data, then stops the workers.

    Slurm and ``timeout`` send SIGTERM, and a terminal SIGINT, to a whole process group; workers that ended at once
    would take their data with them, and without the forkserver the agent would not know how they ended.
    """
    if os.getpid() != _FORKSERVER:
        timer = threading.Timer(GRACE, os._exit, (128 + number,))
        timer.daemon = True
        timer.start()


for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _end_later)

quiet_ends()
for module in LATE:
    import_module(module)
for module in OPTIONAL:
    with contextlib.suppress(ImportError):
        import_module(module)
get_versions()  # reads the metadata of every package that it knows, and keeps the answers
# A collection in a worker would write to, and so copy, the pages that it shares with the others.
gc.collect()
gc.freeze()
