"""Notify systemd of this process's state, where systemd asked for that (``Type=notify``)."""

from __future__ import annotations

import contextlib
import os
import socket


class Notifier:
    """Sender of messages to systemd's socket; without ``$NOTIFY_SOCKET`` nothing is sent.

    The variable is taken out of the environment: child processes must not notify in this one's place.
    """

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def __call__(self, status: str, *, state: str | None = None) -> None:
        """Send a message; one that systemd does not take is lost, as with sd_notify(3).

        Parameters
        ----------
        status : str
            Text that ``systemctl status`` shows.
        state : {"READY", "STOPPING"}, optional
            State that the process has reached.
        """
        if not self._address:
            return
        lines = [f"STATUS={' '.join(status.split())}", *([f"{state}=1"] if state else [])]
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(1)  # for a systemd that does not read
            sender.connect(self._address)
            sender.send("\n".join(lines).encode())
