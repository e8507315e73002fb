"""What stands in for Kestra's container: a worker whose Docker runner starts tasks as Kestra's does.

    worker.py server …     waits, as the server does
    worker.py task JSON    runs one task in a container of its own and ends with its exit code

What a flow writes as `{{ envs.x }}` and `{{ secret('X') }}` is taken from this container's environment, as Kestra does.
Standard library only; talks to the engine on the socket that Kestra's compose file mounts.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import sys
import threading
from typing import Any

SOCKET = "/var/run/docker.sock"
API = "/v1.41"
TIMEOUT_S = 60.0


class Engine(http.client.HTTPConnection):
    def __init__(self) -> None:
        super().__init__("docker", timeout=TIMEOUT_S)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(SOCKET)


def ask(method: str, path: str, body: Any = None) -> bytes:
    engine = Engine()
    try:
        data = None if body is None else json.dumps(body)
        engine.request(method, API + path, data, {"Content-Type": "application/json"})
        answer = engine.getresponse()
        told = answer.read()
    finally:
        engine.close()
    if answer.status >= 400:
        sys.exit(f"the engine says {answer.status}: {told.decode(errors='replace')}")
    return told


def run_task(task: dict[str, Any]) -> int:
    """`network` and `volumes` are those of the task's runner, `env` is what the flow adds to the three usual ones."""
    given = {
        "KEYBRAKE_URL": os.environ["ENV_KEYBRAKE_URL"],
        "KEYBRAKE_CA": os.environ["ENV_KEYBRAKE_CA"],
        "KEYBRAKE_ISSUER_KEY": base64.b64decode(os.environ["SECRET_KEYBRAKE_ISSUER_KEY"]).decode(),
        **task["env"],
    }
    created = ask(
        "POST",
        "/containers/create",
        {
            "Image": os.environ["ENV_KEYBRAKE_TASK_IMAGE"],
            "Entrypoint": [""],
            "Cmd": task["command"],
            "Env": [f"{name}={value}" for name, value in given.items()],
            "Labels": {"keybrake-test": task["label"]},
            "HostConfig": {
                "NetworkMode": task["network"].replace("{container}", os.environ["ENV_KEYBRAKE_CONTAINER"]),
                "Binds": task["volumes"],
            },
        },
    )
    name = json.loads(created)["Id"]
    try:
        ask("POST", f"/containers/{name}/start")
        code = json.loads(ask("POST", f"/containers/{name}/wait"))["StatusCode"]
        sys.stdout.write(unframed(ask("GET", f"/containers/{name}/logs?stdout=1&stderr=1")))
        return code
    finally:
        ask("DELETE", f"/containers/{name}?force=1")


def unframed(logs: bytes) -> str:
    """Each piece comes behind eight bytes, of which the last four are its length."""
    text = b""
    while logs:
        length = int.from_bytes(logs[4:8], "big")
        text += logs[8 : 8 + length]
        logs = logs[8 + length :]
    return text.decode(errors="replace")


def main() -> None:
    if sys.argv[1] == "task":
        sys.exit(run_task(json.loads(sys.argv[2])))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()


if __name__ == "__main__":
    main()
