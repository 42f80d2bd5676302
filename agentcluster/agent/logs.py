"""Where the package's log lines go: to stderr, and the last to who asks an agent for them; which of dask's stay out."""

from __future__ import annotations

import logging
import sys
from collections import deque

import dask.config
from distributed import Status, Worker

PACKAGE = "agentcluster"


def log_to_stderr() -> None:
    """Send the package's INFO lines to stderr, in the form that dask's configuration has for its own."""
    logger = logging.getLogger(PACKAGE)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(dask.config.get("distributed.admin.log-format", None)))
    logger.addHandler(handler)


def quiet_ends() -> None:
    """Keep out of dask's log what is no error where a worker is being closed.

    A heartbeat is cut off beside a scheduler that does not answer just then; and when a worker ends by itself, a thread
    of its process may still read from the nanny's queue while that is closed.
    """
    for name in ("distributed.worker", "distributed.nanny"):
        logging.getLogger(name).addFilter(_is_no_end)


def _is_no_end(record: logging.LogRecord) -> bool:
    ends = any(said in str(record.msg) for said in ("with scheduler during heartbeat", "process died unexpectedly"))
    return not ends or any(worker.status is Status.running for worker in Worker._instances)


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
