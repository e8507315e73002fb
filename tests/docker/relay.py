"""Carries bytes between a loopback port and a Unix socket on a volume.

So the stand-in for Stripe, which serves the loopback of this machine only, is on that of a sidecar's container:
`relay.py SOCKET` listens there and calls the socket.
"""

from __future__ import annotations

import socket
import sys
import threading
from typing import Callable

PORT = 12111
IDLE_TIMEOUT_S = 120.0
CHUNK_BYTES = 64 * 1024


def serve(listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
    """Until the listener is closed. The callers are the tests' own, so each may have its threads."""
    while True:
        try:
            caller, _ = listener.accept()
        except OSError:
            return
        try:
            called = connect()
        except OSError:
            caller.close()
            continue
        for pair in ((caller, called), (called, caller)):
            threading.Thread(target=carry, args=pair, daemon=True).start()


def carry(source: socket.socket, sink: socket.socket) -> None:
    source.settimeout(IDLE_TIMEOUT_S)
    try:
        while data := source.recv(CHUNK_BYTES):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        source.close()
        sink.close()


def to_unix(path: str) -> socket.socket:
    called = socket.socket(socket.AF_UNIX)
    called.connect(path)
    return called


def main() -> None:
    with socket.create_server(("127.0.0.1", PORT)) as listener:
        serve(listener, lambda: to_unix(sys.argv[1]))


if __name__ == "__main__":
    main()
