"""How Kestra runs a task: a fresh process from line 1 for every attempt, again after any exit code but 0."""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from .process import clean_environment

ATTEMPT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Attempt:
    exit_code: int
    output: str

    @property
    def last_line(self) -> str:
        lines = self.output.strip().splitlines()
        return lines[-1] if lines else ""

    @property
    def failure(self) -> str:
        """The line of a traceback that names the exception, or nothing."""
        named = [line for line in self.output.splitlines() if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", line)]
        return named[-1] if named else ""


class Task:
    """A script with the interpreter and the environment that its flow gives it."""

    def __init__(self, python: Path, script: Path, environment: dict[str, str]) -> None:
        self._command = [str(python), str(script)]
        self._environment = environment

    def start(self) -> subprocess.Popen[str]:
        """One attempt that the caller watches; `finish` ends it."""
        return subprocess.Popen(
            self._command,
            env=clean_environment(self._environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def attempt(self) -> Attempt:
        return finish(self.start())

    def run(self, max_attempts: int, interval_s: float = 0.0) -> list[Attempt]:
        """Attempts until one succeeds, as `retry: {maxAttempts: …, interval: …}` makes them."""
        attempts = [self.attempt()]
        while attempts[-1].exit_code != 0 and len(attempts) < max_attempts:
            time.sleep(interval_s)
            attempts.append(self.attempt())
        return attempts


def finish(process: subprocess.Popen[str]) -> Attempt:
    """Waits for an attempt; one that hangs is killed and counts as failed."""
    try:
        output, _ = process.communicate(timeout=ATTEMPT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        output += f"\nkilled after {ATTEMPT_TIMEOUT_S:.0f} s"
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return Attempt(process.returncode, output)
