"""The routes of Kestra's REST API that tests use, as documented for 1.3 and 2.0, against a server of ours."""

from __future__ import annotations

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Iterator

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "py"))

from rig.engine import KestraRefused  # noqa: E402
from rig.server import ServerKestra, obtain  # noqa: E402

SOURCE = "id: bill\nnamespace: a.b\n"
EXECUTION = {
    "id": "x1",
    "namespace": "a.b",
    "flowId": "bill",
    "originalId": "x0",
    "state": {"current": "FAILED", "histories": [{"state": "CREATED"}, {"state": "FAILED"}]},
    "labels": [{"key": "system.correlationId", "value": "x0"}],
    "taskRunList": [
        {
            "id": "t1",
            "taskId": "charge",
            "value": "{}",
            "state": {"current": "FAILED"},
            "attempts": [{"state": {"current": "RESUBMITTED"}}, {"state": {"current": "FAILED"}}],
        }
    ],
}


class Api:
    """Answers as Kestra does and keeps what it was asked."""

    def __init__(self, version: str) -> None:
        self.asked: list[tuple[str, str, bytes]] = []
        self.known: set[bytes] = set()
        self.actions = "" if version.startswith("1.") else "/actions"
        self.exists = 422 if version.startswith("1.") else 409
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                expected = "Basic " + base64.b64encode(b"me:secret").decode()
                status, told = api.answer(version, self.command, self.path, body)
                if self.headers.get("Authorization") != expected:
                    status, told = 401, None
                data = json.dumps(told).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_PUT = do_DELETE = do_GET

            def log_message(self, *_: Any) -> None:
                """What there is to know is kept."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, version: str, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/v1/configs":
            return 200, {"version": version}
        route = (method, path.removeprefix("/api/v1/main"))
        self.asked.append((*route, body))
        if route == ("POST", "/flows"):
            known = body in self.known
            self.known.add(body)
            return (self.exists, {"message": "exists"}) if known else (200, {})
        broken = "tasks: must not be empty" if b"broken" in body else None
        answers = {
            ("POST", "/flows/validate"): [{"namespace": "a.b", "flow": "bill", "constraints": broken}],
            ("PUT", "/flows/a.b/bill"): {},
            ("POST", "/namespaces/a.b/files?path=%2Flib%2Fkeybrake.py"): None,
            ("POST", "/executions/a.b/bill?labels=team%3Abilling"): EXECUTION,
            ("POST", "/executions/webhook/a.b/bill/a%20key"): {"id": "x2"},
            ("GET", "/executions/x1"): EXECUTION,
            ("GET", "/executions?namespace=a.b&flowId=bill&size=100"): {"results": [{"id": "x1"}]},
            ("GET", "/logs/x1"): [{"timestamp": "now", "level": "INFO", "message": "hello"}],
            ("POST", f"/executions/x1{self.actions}/replay?taskRunId=t1"): {"id": "x3"},
            ("DELETE", f"/executions/x1{self.actions}/kill"): {},
            ("POST", f"/executions/x1{self.actions}/restart"): {},
        }
        return (200, answers[route]) if route in answers else (404, {"message": "no such route"})


@pytest.fixture(params=["1.3.31", "2.0.0"])
def api(request: pytest.FixtureRequest) -> Iterator[Api]:
    api = Api(request.param)
    yield api
    api.stop()


def test_a_running_server_is_taken_first(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KESTRA_URL", api.url)
    monkeypatch.setenv("KESTRA_USER", "me")
    monkeypatch.setenv("KESTRA_PASSWORD", "secret")
    kestra = obtain("9.9.9", tmp_path)
    assert kestra.how == f"server at {api.url}" and kestra.version != "9.9.9"
    assert kestra.dialect == kestra.version[:3]
    assert f"Kestra {kestra.version}: server at" in capsys.readouterr().err


def test_flows_and_files_are_put(api: Api) -> None:
    kestra = ServerKestra(api.url, "me", "secret")
    assert kestra.validate(f"{SOURCE}# broken") == ["tasks: must not be empty"]
    with pytest.raises(KestraRefused, match="must not be empty"):
        kestra.load(f"{SOURCE}# broken")
    kestra.load(SOURCE)
    kestra.load(SOURCE)
    assert api.asked[-1] == ("PUT", "/flows/a.b/bill", SOURCE.encode())
    kestra.put_file("a.b", "lib/keybrake.py", b"X = 1")
    assert b'name="fileContent"; filename="fileContent"\r\n\r\nX = 1\r\n' in api.asked[-1][2]


def test_executions_are_started_and_read(api: Api) -> None:
    kestra = ServerKestra(api.url, "me", "secret")
    assert kestra.run("a.b", "bill", {"n": 3, "name": "x", "book": b"pages"}, {"team": "billing"}) == "x1"
    form = api.asked[-1][2]
    for part in (b'name="n"\r\n\r\n3\r\n', b'name="name"\r\n\r\nx\r\n', b'filename="book"\r\n\r\npages\r\n'):
        assert part in form
    assert kestra.webhook("a.b", "bill", "a key", {"event": 1}) == "x2"
    ended = kestra.wait("x1")
    assert (ended.state, ended.changes, ended.original_id) == ("FAILED", 2, "x0")
    assert ended.labels == {"system.correlationId": "x0"}
    assert ended.runs_of("charge")[0].attempts == ["RESUBMITTED", "FAILED"]
    assert kestra.executions("a.b", "bill") == [ended]
    assert kestra.execution("gone") is None
    assert "INFO hello" in kestra.logs("x1")


def test_executions_are_repeated_and_killed(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    kestra = ServerKestra(api.url, "me", "secret")
    assert kestra.replay("x1", "t1") == "x3"
    kestra.kill("x1")
    monkeypatch.setattr("rig.engine.RESTART_TIMEOUT_S", 0.1)
    with pytest.raises(KestraRefused, match="was not restarted"):
        kestra.restart("x1")
    assert ("POST", f"/executions/x1{api.actions}/restart", b"") in api.asked


def test_a_wrong_password_is_said(api: Api) -> None:
    with pytest.raises(Exception, match="401"):
        ServerKestra(api.url, "me", "wrong")
