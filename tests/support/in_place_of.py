"""A pytest plugin for the tests of others: it runs ``dask-agent`` in place of the command that they start.

``AGENTCLUSTER_IN_PLACE_OF`` has the words of that command and the words that stand for them, as JSON: two lists.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

OLD, NEW = json.loads(os.environ["AGENTCLUSTER_IN_PLACE_OF"])


def replaced(words: list[str]) -> list[str]:
    """Return a command line with :data:`NEW` for :data:`OLD`, after the program itself."""
    for place in range(1, len(words)):
        if words[place : place + len(OLD)] == OLD:
            return [*words[:place], *NEW, *words[place + len(OLD) :]]
    return words


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A process whose command line has the other words."""

    def __init__(self, args: Any, *more: Any, **options: Any) -> None:
        super().__init__(replaced(list(args)) if isinstance(args, list | tuple) else args, *more, **options)


subprocess.Popen = Popen  # type: ignore[misc]
