"""Taking this package to a scheduler that has only distributed: its sources travel inside the plugin's pickle.

Where the pickle is loaded, the package becomes importable from memory (:mod:`agentcluster.landing`); nothing is written
there, and an installed agentcluster is preferred. So what is pickled by name, errors among it, is the same there as
here. cloudpickle could carry the plugin by value, but then the scheduler would need the very same Python, and each
error that it raises would be of a class that no client knows.
"""

from __future__ import annotations

import pickle
import zlib
from pathlib import Path
from typing import Any

import agentcluster

_ROOT = Path(__file__).parent
_RUN = "[exec(source, space), space['land'](files, version)][1]"


def shipped() -> bytes:
    """Return a pickle that is a new :class:`agentcluster.plugin.AgentPlugin`, wherever distributed is installed."""
    return pickle.dumps(_Shipment())


class _Shipment:
    """What becomes the plugin when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        files = {
            path.relative_to(_ROOT.parent).as_posix(): zlib.compress(path.read_bytes())
            for pattern in ("*.py", "*.yaml")
            for path in sorted(_ROOT.rglob(pattern))
        }
        source = (_ROOT / "landing.py").read_text()
        return eval, (
            _RUN,
            {"source": source, "space": {}, "files": files, "version": agentcluster.__version__},
        )
