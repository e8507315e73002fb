"""A real Kestra for tests: flows are loaded, run, crashed and asked for in one way, whatever runs them."""

from __future__ import annotations

import abc
import base64
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

from .process import REPO, RigError, clean_environment, wait_until

SETUP_TIMEOUT_S = 900.0
# How tests/e2e/setup.py ends when something is missing.
EXIT_MISSING = 69
# Seconds on an idle machine; a busy one takes long.
READY_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 30.0
# An execution ends within seconds; one whose worker was lost waits for that to be noticed.
WAIT_TIMEOUT_S = 90.0
RESTART_TIMEOUT_S = 20.0
# What is left to do when the grace of the worker is over.
STOP_EXTRA_S = 30.0
POLL_S = 0.1
TERMINAL = frozenset({"SUCCESS", "WARNING", "FAILED", "KILLED", "CANCELLED", "SKIPPED", "RETRIED"})


class KestraRefused(Exception):
    """Kestra did not do what it was asked to, and says why."""


class NoKestra(RigError):
    """What it takes is not to be had on this machine."""


@dataclass(frozen=True)
class TaskRun:
    """One task run; the attempts are their states, oldest first."""

    id: str
    task_id: str
    state: str
    value: str | None
    attempts: list[str]
    outputs: dict[str, Any]


@dataclass(frozen=True)
class Execution:
    """An execution, with the task runs of the iterations of its Loops. `changes` counts the states it went through."""

    id: str
    namespace: str
    flow: str
    state: str
    changes: int
    original_id: str | None
    labels: dict[str, str]
    outputs: dict[str, Any]
    task_runs: list[TaskRun]

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    def runs_of(self, task_id: str) -> list[TaskRun]:
        return [run for run in self.task_runs if run.task_id == task_id]


class Kestra(abc.ABC):
    """One Kestra, of whatever kind. Its flows are in the tenant `main`."""

    version: str
    # Which flows it takes: "1.3" or "2.0".
    dialect: str
    # What it is, in words.
    how: str

    @abc.abstractmethod
    def validate(self, source: str) -> list[str]:
        """What is wrong with a flow: unknown and missing properties, wrong types. Nothing when it is valid."""

    @abc.abstractmethod
    def load(self, source: str) -> None:
        """Creates a flow or makes a new revision of it. To stop a Schedule, load it again with `disabled: true`."""

    @abc.abstractmethod
    def put_file(self, namespace: str, path: str, content: bytes) -> None:
        """A file of the namespace."""

    @abc.abstractmethod
    def run(
        self,
        namespace: str,
        flow: str,
        inputs: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> str:
        """Starts an execution and answers its id at once. Bytes are the content of a FILE input."""

    @abc.abstractmethod
    def webhook(self, namespace: str, flow: str, key: str, body: Any) -> str:
        """What somebody posts to a Webhook trigger: the id of the execution that it starts."""

    @abc.abstractmethod
    def replay(self, execution: str, task_run: str | None = None) -> str:
        """The id of a new execution that repeats the whole one, or all from a task run on."""

    @abc.abstractmethod
    def kill(self, execution: str) -> None: ...

    @abc.abstractmethod
    def execution(self, id: str) -> Execution | None: ...

    @abc.abstractmethod
    def executions(self, namespace: str, flow: str) -> list[Execution]:
        """Those of a flow, without the iterations of Loops."""

    @abc.abstractmethod
    def logs(self, execution: str) -> str:
        """What its scripts said."""

    @abc.abstractmethod
    def _restart(self, execution: str) -> None: ...

    @abc.abstractmethod
    def close(self) -> None:
        """Ends what was started for it."""

    def restart(self, execution: str) -> None:
        """Repeats what failed, in the same execution. Kestra 2.0 only logs it when there is nothing to restart."""
        before = self.execution(execution)
        self._restart(execution)

        def restarted() -> bool:
            now = self.execution(execution)
            return now is not None and before is not None and now.changes != before.changes

        try:
            wait_until("the execution is restarted", restarted, RESTART_TIMEOUT_S)
        except RigError as error:
            raise KestraRefused(f"{execution} was not restarted") from error

    def wait(self, id: str, timeout_s: float = WAIT_TIMEOUT_S) -> Execution:
        """The execution, once it has ended."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = self.execution(id)
            if found is not None and found.terminal:
                return found
            if time.monotonic() > deadline:
                said = self.logs(id) if found else ""
                raise RigError(f"execution {id} has not ended in {timeout_s:.0f} s: {found}\n{said}")
            time.sleep(POLL_S)

    def __enter__(self) -> Kestra:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EmbeddedKestra(Kestra):
    """The released engine in a process of ours, `tests/e2e/engine`: no REST layer, and a double of the Python task.

    `environment` is that of the worker: `ENV_X` becomes `envs.x`, `SECRET_X` (base64) `secret('X')`. The folder of this
    interpreter comes first on its PATH, so that `python3` in a task has what this one has.
    """

    how = "embedded engine"

    def __init__(
        self, version: str, workdir: Path, environment: Mapping[str, str] | None = None, grace_s: float = 5.0
    ) -> None:
        engine = made(version)
        self.version = version
        self.dialect = engine["dialect"]
        self.log = workdir / f"kestra-{version}.log"
        self._data = workdir / f"kestra-{version}"
        self._data.mkdir(parents=True, exist_ok=True)
        self._grace_s = grace_s
        self._command = [*engine["command"], str(self._data), f"PT{grace_s}S"]
        self._environment = clean_environment({**worker_path(), **(environment or {})})
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self.start()

    # The process.

    def start(self) -> None:
        """Starts the engine, again on the same data, and waits until it is ready."""
        if self._process is not None and self._process.poll() is None:
            raise RigError("the engine runs already")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._answers = queue.Queue()
        threading.Thread(target=self._read, args=(self._process, self._answers), daemon=True).start()
        try:
            self._answer(READY_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _read(process: subprocess.Popen[str], answers: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(line)
        answers.put(None)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def crash(self) -> None:
        """SIGKILL of the engine only: its scripts live on."""
        assert self._process is not None
        self._process.kill()
        self._ended(STOP_EXTRA_S)

    def stop(self) -> None:
        """SIGTERM, as a rolling restart sends it: the worker waits for its scripts until the grace is over."""
        assert self._process is not None
        self._process.terminate()
        self._ended(self._grace_s + STOP_EXTRA_S)

    def _ended(self, timeout_s: float) -> None:
        assert self._process is not None
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_EXTRA_S)
            raise RigError(f"the engine did not end in {timeout_s:.0f} s:\n{self.tail()}") from None
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def hang_up(self) -> None:
        """What the engine sees when the process that started it is gone."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.close()
        self._ended(STOP_EXTRA_S)

    def scripts(self) -> list[int]:
        """Processes that run in a working directory of a task here, those of an engine that is gone too."""
        return scripts_under(self._data / "tasks")

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.crash()
        end(self.scripts())

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    # Requests.

    def _ask(self, do: str, **arguments: Any) -> Any:
        with self._lock:
            assert self._process is not None and self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
                self._process.stdin.flush()
            except (BrokenPipeError, ValueError) as error:
                raise RigError(f"the engine does not run:\n{self.tail()}") from error
            return self._answer(ANSWER_TIMEOUT_S)

    def _answer(self, timeout_s: float) -> Any:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            # The answer may still come, and would be taken for that of the next request.
            self.crash()
            raise RigError(f"the engine has not answered in {timeout_s:.0f} s:\n{self.tail()}") from None
        if line is None:
            raise RigError(f"the engine has ended:\n{self.tail()}")
        answer = json.loads(line)
        if "refused" in answer:
            raise KestraRefused(answer["refused"])
        return answer["ok"]

    def validate(self, source: str) -> list[str]:
        return self._ask("validate", source=source)

    def load(self, source: str) -> None:
        violations = self.validate(source)
        if violations:
            raise KestraRefused("\n".join(violations))
        self._ask("load", source=source)

    def put_file(self, namespace: str, path: str, content: bytes) -> None:
        self._ask("put_file", namespace=namespace, path=path, content=base64.b64encode(content).decode())

    def run(
        self,
        namespace: str,
        flow: str,
        inputs: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> str:
        given = inputs or {}
        files = {name: base64.b64encode(value).decode() for name, value in given.items() if isinstance(value, bytes)}
        values = {name: value for name, value in given.items() if name not in files}
        return self._ask(
            "run", namespace=namespace, flow=flow, inputs=values, files=files, labels=dict(labels or {})
        )

    def webhook(self, namespace: str, flow: str, key: str, body: Any) -> str:
        return self._ask("webhook", namespace=namespace, flow=flow, key=key, body=json.dumps(body))

    def _restart(self, execution: str) -> None:
        self._ask("restart", id=execution)

    def replay(self, execution: str, task_run: str | None = None) -> str:
        return self._ask("replay", id=execution, task_run=task_run)

    def kill(self, execution: str) -> None:
        self._ask("kill", id=execution)

    def execution(self, id: str) -> Execution | None:
        told = self._ask("execution", id=id)
        return told_execution(told) if told is not None else None

    def executions(self, namespace: str, flow: str) -> list[Execution]:
        return [told_execution(told) for told in self._ask("executions", namespace=namespace, flow=flow)]

    def logs(self, execution: str) -> str:
        return self._ask("logs", id=execution)


def told_execution(told: dict[str, Any]) -> Execution:
    runs = [TaskRun(**{**run, "outputs": run["outputs"] or {}}) for run in told["task_runs"]]
    return Execution(**{**told, "outputs": told["outputs"] or {}, "task_runs": runs})


def made(version: str, *options: str) -> dict[str, Any]:
    """What tests/e2e/setup.py says of this version; it fetches and compiles the first time."""
    done = subprocess.run(
        [sys.executable, str(REPO / "tests" / "e2e" / "setup.py"), *options, version],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=SETUP_TIMEOUT_S,
    )
    if done.returncode != 0:
        kind = NoKestra if done.returncode == EXIT_MISSING else RigError
        raise kind(f"no Kestra {version}:\n{done.stderr}")
    return json.loads(done.stdout)


def worker_path() -> dict[str, str]:
    """PATH with this interpreter first."""
    return {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])}


def scripts_under(tasks: Path) -> list[int]:
    """Processes whose command line names a file there."""
    return [pid for pid, command in running() if f"{tasks}{os.sep}" in command]


def end(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def running() -> list[tuple[int, str]]:
    """Processes of this machine and their command lines."""
    if not Path("/proc/self/cmdline").exists():
        listed = subprocess.run(
            ["ps", "-axo", "pid=,command="], capture_output=True, text=True, check=True, timeout=ANSWER_TIMEOUT_S
        )
        pairs = [line.split(None, 1) for line in listed.stdout.splitlines()]
        return [(int(pair[0]), pair[1]) for pair in pairs if len(pair) == 2]
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # Ended since it was listed.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                found.append((int(entry.name), words.decode(errors="replace")))
    return found
