"""A Kestra behind its REST API: one that runs already, the released jar, or the official image.

The routes are those of the documentation of 1.3 and 2.0. The client is tested against a server of ours that answers as
they say; a Kestra with a REST layer was not at hand where this was written, so expect to mend details. Two things are
missing in comparison with the embedded engine: task runs inside a Loop of 2.0, and outputs where 2.0 has moved them.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Callable, Mapping

from .engine import (
    EmbeddedKestra,
    Execution,
    Kestra,
    KestraRefused,
    NoKestra,
    TaskRun,
    end,
    made,
    scripts_under,
    worker_path,
)
from .http import Refused, decoded
from .process import Child, RigError, free_port, wait_until

TIMEOUT_S = 30.0
READY_TIMEOUT_S = 180.0
FETCH_TIMEOUT_S = 600.0
STOP_EXTRA_S = 30.0
# A page of executions; tests make fewer.
EXECUTIONS_MAX = 100
YAML = "application/x-yaml"
REASON_MAX = 300
# A lost worker is noticed in 10 s.
LIVENESS = {"interval": "2s", "timeout": "10s", "initialDelay": "5s", "heartbeatInterval": "1s"}
IMAGE = "kestra/kestra"
USER = "admin@kestra.io"


class ServerKestra(Kestra):
    """A Kestra that runs somewhere, by its address."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self._url = url.rstrip("/")
        self._authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self.how = f"server at {self._url}"
        self._ask_version()

    def _ask_version(self) -> None:
        told = self._call("GET", "/api/v1/configs")
        self.version = told["version"]
        self.dialect = "1.3" if self.version.startswith("1.") else "2.0"

    def close(self) -> None:
        """It was there before and stays."""

    def _call(self, method: str, path: str, body: bytes | None = None, content: str | None = None) -> Any:
        headers = {"Authorization": self._authorization, "Accept": "application/json"}
        if content is not None:
            headers["Content-Type"] = content
        request = urllib.request.Request(self._url + path, data=body, headers=headers, method=method)
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=TIMEOUT_S) as answer:
                return decoded(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(error.code, decoded(error.read())) from None

    def _main(self, method: str, path: str, body: bytes | None = None, content: str | None = None) -> Any:
        try:
            return self._call(method, f"/api/v1/main{path}", body, content)
        except Refused as error:
            raise KestraRefused(str(error)) from error

    def validate(self, source: str) -> list[str]:
        return [one["constraints"] for one in self._validated(source) if one.get("constraints")]

    def _validated(self, source: str) -> list[dict[str, Any]]:
        return self._main("POST", "/flows/validate", source.encode(), YAML)

    def load(self, source: str) -> None:
        (told,) = self._validated(source)
        if told.get("constraints"):
            raise KestraRefused(told["constraints"])
        try:
            self._call("POST", "/api/v1/main/flows", source.encode(), YAML)
        except Refused as error:
            # What 1.3 and what 2.0 says of a flow that is there.
            if error.status not in (422, 409):
                raise KestraRefused(str(error)) from error
            self._main("PUT", f"/flows/{told['namespace']}/{told['flow']}", source.encode(), YAML)

    def put_file(self, namespace: str, path: str, content: bytes) -> None:
        body, kind = multipart({}, {"fileContent": content})
        at = urllib.parse.quote("/" + path.lstrip("/"), safe="")
        self._main("POST", f"/namespaces/{namespace}/files?path={at}", body, kind)

    def run(
        self,
        namespace: str,
        flow: str,
        inputs: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> str:
        given = inputs or {}
        files = {name: value for name, value in given.items() if isinstance(value, bytes)}
        texts = {name: text(value) for name, value in given.items() if name not in files}
        body, kind = multipart(texts, files)
        query = urllib.parse.urlencode([("labels", f"{name}:{value}") for name, value in (labels or {}).items()])
        return self._main("POST", f"/executions/{namespace}/{flow}?{query}", body, kind)["id"]

    def webhook(self, namespace: str, flow: str, key: str, body: Any) -> str:
        path = f"/executions/webhook/{namespace}/{flow}/{urllib.parse.quote(key, safe='')}"
        told = self._main("POST", path, json.dumps(body).encode(), "application/json")
        if not isinstance(told, dict) or "id" not in told:
            raise KestraRefused(f"the webhook started nothing: {told}")
        return told["id"]

    def _action(self, method: str, execution: str, action: str, query: str = "") -> Any:
        middle = "" if self.dialect == "1.3" else "actions/"
        return self._main(method, f"/executions/{execution}/{middle}{action}{query}")

    def _restart(self, execution: str) -> None:
        self._action("POST", execution, "restart")

    def replay(self, execution: str, task_run: str | None = None) -> str:
        return self._action("POST", execution, "replay", f"?taskRunId={task_run}" if task_run else "")["id"]

    def kill(self, execution: str) -> None:
        self._action("DELETE", execution, "kill")

    def execution(self, id: str) -> Execution | None:
        try:
            return read(self._call("GET", f"/api/v1/main/executions/{id}"))
        except Refused as error:
            if error.status == 404:
                return None
            raise KestraRefused(str(error)) from error

    def executions(self, namespace: str, flow: str) -> list[Execution]:
        query = urllib.parse.urlencode({"namespace": namespace, "flowId": flow, "size": EXECUTIONS_MAX})
        # What is listed is shortened in 2.0.
        listed = [self.execution(one["id"]) for one in self._main("GET", f"/executions?{query}")["results"]]
        return [one for one in listed if one is not None]

    def logs(self, execution: str) -> str:
        entries = self._main("GET", f"/logs/{execution}")
        return "".join(f"{entry['timestamp']} {entry['level']} {entry.get('message')}\n" for entry in entries)


class OwnKestra(ServerKestra):
    """One that is started for a test, on H2 and loopback, set as the embedded engine is."""

    def __init__(self, version: str, workdir: Path, grace_s: float) -> None:
        self.log = workdir / f"kestra-{version}.log"
        self._home = workdir / f"kestra-{version}"
        self._home.mkdir(parents=True, exist_ok=True)
        self._grace_s = grace_s
        self._port = free_port()
        self._password = f"Aa1{secrets.token_hex(16)}"

    def _settings(self) -> str:
        """JSON is YAML."""
        docker = {"type": "io.kestra.plugin.scripts.runner.docker.Docker", "values": {"volume-enabled": True}}
        database = f"jdbc:h2:file:{self._home / 'database'};TIME ZONE=UTC;DB_CLOSE_ON_EXIT=FALSE"
        settings = {
            "micronaut": {"server": {"host": "127.0.0.1", "port": self._port}},
            "datasources": {"h2": {"url": database}},
            "kestra": {
                "server": {
                    "basic-auth": {"username": USER, "password": self._password},
                    "workerTaskRestartStrategy": "IMMEDIATELY",
                    "terminationGracePeriod": f"PT{self._grace_s}S",
                    "liveness": LIVENESS,
                },
                "storage": {"type": "local", "local": {"base-path": str(self._home / "storage")}},
                "anonymous-usage-report": {"enabled": False},
                "ui-anonymous-usage-report": {"enabled": False},
                "tutorial-flows": {"enabled": False},
                "tasks": {"tmp-dir": {"path": str(self._home / "tasks")}},
                "plugins": {"configurations": [docker]},
            },
        }
        return json.dumps(settings)

    def _connect(self, alive: Callable[[], None]) -> None:
        def ready() -> bool:
            alive()
            with contextlib.suppress(Refused, urllib.error.URLError, ConnectionError, TimeoutError):
                ServerKestra.__init__(self, f"http://127.0.0.1:{self._port}", USER, self._password)
                return True
            return False

        try:
            wait_until("Kestra answers", ready, READY_TIMEOUT_S)
        except BaseException:
            self.close()
            raise


class JarKestra(OwnKestra):
    """The released jar and the released Python plugin. Tasks need `uv` on the PATH, else the plugin downloads it."""

    def __init__(
        self, version: str, workdir: Path, environment: Mapping[str, str] | None = None, grace_s: float = 5.0
    ) -> None:
        if not shutil.which("uv"):
            raise RigError("the Python plugin needs `uv` on the PATH")
        jar = made(version, "--released")
        super().__init__(version, workdir, grace_s)
        settings = self._home / "kestra.json"
        settings.write_text(self._settings())
        self._environment = {**worker_path(), **(environment or {})}
        self._command = [
            jar["java"], "-Xmx1g", "-XX:+UseSerialGC", "-jar", jar["jar"], "server", "local",
            "-p", jar["plugins"], "-c", str(settings), "--port", str(self._port), "--no-tutorials",
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        self._child = Child(self._command, self._environment, self.log)
        self._connect(lambda: self._child.must_run("Kestra"))
        self.how = "released jar"

    def crash(self) -> None:
        self._child.kill()

    def stop(self) -> None:
        os.kill(self._child.pid, signal.SIGTERM)
        wait_until("Kestra ends", lambda: self._child.exit_code() is not None, self._grace_s + STOP_EXTRA_S)

    def scripts(self) -> list[int]:
        return scripts_under(self._home / "tasks")

    def close(self) -> None:
        if self._child.exit_code() is None:
            self._child.kill()
        end(self.scripts())


class ImageKestra(OwnKestra):
    """The official image, on the network of this machine. It cannot be crashed: its scripts would go with it."""

    def __init__(
        self, version: str, workdir: Path, environment: Mapping[str, str] | None = None, grace_s: float = 5.0
    ) -> None:
        image = f"{IMAGE}:v{version}"
        if docker("image", "inspect", image) is None and docker("pull", image) is None:
            raise RigError(f"no Docker engine, or no image {image}")
        super().__init__(version, workdir, grace_s)
        given = {"KESTRA_CONFIGURATION": self._settings(), **(environment or {})}
        variables = [part for name, value in given.items() for part in ("--env", f"{name}={value}")]
        mounts = ["--volume", f"{workdir}:{workdir}", "--volume", f"{self._home}:{self._home}"]
        started = docker("run", "--detach", "--network", "host", *mounts, *variables, image, "server", "local")
        if started is None:
            raise RigError(f"{image} did not start")
        self._container = started.strip()
        self._connect(self._must_run)
        self.how = "official image"

    def _must_run(self) -> None:
        if docker("inspect", "--format", "{{.State.Running}}", self._container) != "true\n":
            raise RigError(f"the image has ended:\n{docker('logs', '--tail', '30', self._container)}")

    def close(self) -> None:
        docker("rm", "--force", "--volumes", self._container)


def docker(*arguments: str) -> str | None:
    """What the Docker command line answers; nothing when there is none or it fails."""
    if not shutil.which("docker"):
        return None
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=FETCH_TIMEOUT_S)
    return done.stdout if done.returncode == 0 else None


def obtain(
    version: str, workdir: Path, environment: Mapping[str, str] | None = None, grace_s: float = 5.0
) -> Kestra:
    """A Kestra: the one at KESTRA_URL, else of this version the released jar, the official image, or the engine alone.

    Says on stderr what was taken, and why nothing before it. NoKestra when none is to be had.
    """
    url = os.environ.get("KESTRA_URL")
    if url:
        found = ServerKestra(url, os.environ.get("KESTRA_USER", USER), os.environ.get("KESTRA_PASSWORD", ""))
        say(f"Kestra {found.version}: {found.how} (KESTRA_URL)")
        return found
    why = ["KESTRA_URL is not set"]
    for kind in (JarKestra, ImageKestra, EmbeddedKestra):
        try:
            kestra = kind(version, workdir, environment, grace_s)
        except RigError as error:
            if kind is EmbeddedKestra and not isinstance(error, NoKestra):
                # It is there and broken, which is another matter.
                raise
            why.append(f"{kind.__name__}: {' '.join(str(error).split())[:REASON_MAX]}")
            continue
        say(f"Kestra {version}: {kestra.how} ({'; '.join(why)})")
        return kestra
    raise NoKestra(f"there is no Kestra {version}: {'; '.join(why)}")


def say(told: str) -> None:
    print(told, file=sys.stderr, flush=True)


def read(told: dict[str, Any]) -> Execution:
    runs = [
        TaskRun(
            id=run["id"],
            task_id=run["taskId"],
            state=run["state"]["current"],
            value=run.get("value"),
            attempts=[attempt["state"]["current"] for attempt in run.get("attempts") or []],
            outputs=run.get("outputs") or {},
        )
        for run in told.get("taskRunList") or []
    ]
    return Execution(
        id=told["id"],
        namespace=told["namespace"],
        flow=told["flowId"],
        state=told["state"]["current"],
        changes=len(told["state"].get("histories") or []),
        original_id=told.get("originalId"),
        labels={label["key"]: label["value"] for label in told.get("labels") or []},
        outputs=told.get("outputs") or {},
        task_runs=runs,
    )


def text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def multipart(texts: Mapping[str, str], files: Mapping[str, bytes]) -> tuple[bytes, str]:
    """A body of form data, and its content type."""
    boundary = secrets.token_hex(16)
    parts = [(f'name="{name}"', value.encode()) for name, value in texts.items()]
    parts += [(f'name="{name}"; filename="{name}"', value) for name, value in files.items()]
    body = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {what}\r\n\r\n".encode() + value + b"\r\n"
        for what, value in parts
    )
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
