"""Where the package's log lines go: to stderr, and the last ones to who asks an agent for them."""

from __future__ import annotations

import logging
import sys
from collections import deque

import dask.config

PACKAGE = "agentcluster"


def log_to_stderr() -> None:
    """Send the package's INFO lines to stderr, in the form that dask's configuration has for its own."""
    logger = logging.getLogger(PACKAGE)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(dask.config.get("distributed.admin.log-format", None)))
    logger.addHandler(handler)


class LastLines(logging.Handler):
    """Keeps the last lines of the package's log, from :meth:`begin` to :meth:`end`.

    Parameters
    ----------
    count
        How many are kept.
    """

    def __init__(self, count: int) -> None:
        super().__init__(logging.INFO)
        self._kept: deque[str] = deque(maxlen=count)
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self._kept.append(self.format(record))

    def lines(self) -> list[str]:
        """Return what was kept, oldest first."""
        return list(self._kept)

    def begin(self) -> None:
        """Listen."""
        logging.getLogger(PACKAGE).addHandler(self)

    def end(self) -> None:
        """Listen no more."""
        logging.getLogger(PACKAGE).removeHandler(self)
