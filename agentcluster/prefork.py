"""What the forkserver does last before the first worker is forked from it: what every worker would do again.

Imported there, by name, after the modules of the configuration; nowhere else.
"""

from __future__ import annotations

import gc
from importlib import import_module

from distributed.versions import get_versions

#: What a worker imports while it starts, beyond what comes with distributed.
LATE = (
    "agentcluster.forkserver",
    "distributed.http.health",
    "distributed.http.prometheus",
    "distributed.http.statics",
    "distributed.http.worker",
    "distributed.nanny",
    "email.policy",
    "multiprocessing.synchronize",
    "tornado.platform.asyncio",
)

for module in LATE:
    import_module(module)
get_versions()  # reads the metadata of every package that it knows, and keeps the answers
# A collection in a worker would write to, and so copy, the pages that it shares with the others.
gc.collect()
gc.freeze()
