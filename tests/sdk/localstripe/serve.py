#!/usr/bin/env python3
"""localstripe on loopback, on a port that the system chooses; says `{"listening": "127.0.0.1:PORT"}` and serves.

Its own command listens on every interface and keeps its objects in a file under /tmp that all its processes share.
Nothing of its answers is changed.
"""

import json
import socket
import sys

from aiohttp import web
from localstripe.resources import Store
from localstripe.server import app

SHUTDOWN_TIMEOUT_S = 1.0


async def account(_: web.Request) -> web.Response:
    """Whose account this is: the sidecar asks at its start, and localstripe does not know the question."""
    return web.json_response({"object": "account", "id": sys.argv[1]})


def main() -> None:
    Store.dump_to_disk = lambda self: None
    app.router.add_get("/v1/account", account)
    listener = socket.create_server(("127.0.0.1", 0))
    print(json.dumps({"listening": "%s:%d" % listener.getsockname()}), flush=True)
    web.run_app(app, sock=listener, print=None, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S)


main()
