"""What the forkserver does last before the first worker is forked from it: what every worker would do again.

Imported there, by name, after the modules of the configuration; nowhere else.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from importlib import import_module

from distributed.versions import get_versions

from agentcluster.agent.logs import quiet_ends

#: What a worker imports while it starts, beyond what comes with distributed.
LATE = (
    "agentcluster.agent.forkserver",
    "distributed.http.health",
    "distributed.http.prometheus",
    "distributed.http.statics",
    "distributed.http.worker",
    "distributed.nanny",
    "email.policy",
    "multiprocessing.synchronize",
    "tornado.platform.asyncio",
)

#: Seconds after SIGTERM at which a worker ends that nobody has ended until then.
GRACE = 30.0

_FORKSERVER = os.getpid()


def _end_later(*_: object) -> None:
    """Take SIGTERM: it is the agent's to have data moved and workers stopped.

    Slurm, ``timeout`` and a terminal send it to a whole process group; workers that ended at once would take their data
    with them, and without the forkserver nobody knew how they ended.
    """
    if os.getpid() != _FORKSERVER:
        timer = threading.Timer(GRACE, os._exit, (128 + signal.SIGTERM,))
        timer.daemon = True
        timer.start()


signal.signal(signal.SIGTERM, _end_later)

quiet_ends()
for module in LATE:
    import_module(module)
get_versions()  # reads the metadata of every package that it knows, and keeps the answers
# A collection in a worker would write to, and so copy, the pages that it shares with the others.
gc.collect()
gc.freeze()
