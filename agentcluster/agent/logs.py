"""Logs of the agent's process: to stderr, and the last lines to callers that ask for them; a filter for dask's own."""

from __future__ import annotations

import logging
import sys
from collections import deque

import dask.config
from distributed import Status, Worker

PACKAGE = "agentcluster"

#: Parts of messages that dask logs when a worker that is being closed is interrupted.
CLOSING_NOISE = ("with scheduler during heartbeat", "process died unexpectedly")


def log_to_stderr() -> None:
    """Send the package's INFO lines to stderr, in the format of dask's configuration."""
    logger = logging.getLogger(PACKAGE)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(dask.config.get("distributed.admin.log-format", None)))
    logger.addHandler(handler)


def quiet_ends() -> None:
    """Filter out errors that dask logs when a worker is closed in order.

    A heartbeat is cut off when the scheduler does not answer at that moment; and when a worker ends by itself, a thread
    of its process may still read from the nanny's queue while that is closed.
    """
    for name in ("distributed.worker", "distributed.nanny"):
        logging.getLogger(name).addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    noise = any(part in str(record.msg) for part in CLOSING_NOISE)
    return not noise or any(worker.status is Status.running for worker in Worker._instances)


class LastLines(logging.Handler):
    """Keeps the last lines of the package's log, from :meth:`begin` to :meth:`end`.

    Parameters
    ----------
    count
        Number of lines that are kept; a message of several lines counts as many.
    """

    def __init__(self, count: int) -> None:
        super().__init__(logging.INFO)
        self._kept: deque[str] = deque(maxlen=count)
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the lines of a message.

        Parameters
        ----------
        record
            The message.
        """
        self._kept.extend(self.format(record).splitlines())

    def lines(self) -> list[str]:
        """Return the kept lines, oldest first.

        Returns
        -------
        list of str
            The lines; the first of each message begins with time, logger and level.
        """
        return list(self._kept)

    def begin(self) -> None:
        """Start to keep lines."""
        logging.getLogger(PACKAGE).addHandler(self)

    def end(self) -> None:
        """Stop keeping lines; those that were kept stay."""
        logging.getLogger(PACKAGE).removeHandler(self)
