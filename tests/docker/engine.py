"""A Docker engine and its compose: those that are here, else ones of our own. What is missing ends the run."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator, NoReturn

import pytest
import setup
from rig.process import REPO, Child, clean_environment, wait_until

CACHE = REPO / ".cache"
COMMAND_TIMEOUT_S = 120
PULL_TIMEOUT_S = 300
BUILD_TIMEOUT_S = 1800
INSTALL_TIMEOUT_S = 900
ENGINE_START_TIMEOUT_S = 60
COMPOSE_VERSION = "v2.40.3"
COMPOSE_MODULE = "github.com/docker/compose/v2"


class CommandError(Exception):
    """A command that failed; the message holds what it said."""


def missing(what: str) -> NoReturn:
    """Whoever asks for these tests wants them run: that they cannot is no success."""
    pytest.exit(f"test-docker: {what}", returncode=1)


def command(
    arguments: list[str],
    environment: dict[str, str] | None = None,
    *,
    timeout_s: float = COMMAND_TIMEOUT_S,
    cwd: Path | None = None,
) -> str:
    """What a command prints to stdout."""
    done = subprocess.run(
        arguments,
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    if done.returncode != 0:
        told = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise CommandError(f"exit code {done.returncode}: {' '.join(arguments)}\n{told}")
    return done.stdout


def installed(program: str, package: str) -> None:
    """Sees to it that a program is there, with Debian's own package where that can be installed."""
    if shutil.which(program):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        missing(f"there is no {program}: install {package}, or set DOCKER_HOST to an engine that answers")
    print(f"test-docker: installing {package}", file=sys.stderr, flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        command(["apt-get", "update", "-q"], quiet, timeout_s=INSTALL_TIMEOUT_S)
        install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *package.split()]
        command(install, quiet, timeout_s=INSTALL_TIMEOUT_S)
    except CommandError as error:
        missing(f"there is no {program}, and {package} cannot be installed: {error}")


class Engine:
    """The `docker` command, towards one engine."""

    def __init__(self, host: str) -> None:
        self.environment = clean_environment({"DOCKER_HOST": host})
        self.socket = host.removeprefix("unix://")

    def docker(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        return command(["docker", *arguments], self.environment, timeout_s=timeout_s)

    def answers(self) -> bool:
        try:
            self.docker("version", "--format", "{{.Server.Version}}", timeout_s=10)
        except (CommandError, OSError, subprocess.TimeoutExpired):
            return False
        return True

    def inspect(self, name: str) -> dict[str, Any]:
        return json.loads(self.docker("inspect", name))[0]

    def health(self, name: str) -> str:
        return self.inspect(name)["State"]["Health"]["Status"]

    def wait_healthy(self, name: str) -> None:
        def healthy() -> bool:
            state = self.inspect(name)["State"]
            if state["Status"] not in ("created", "running"):
                raise CommandError(f"{name} is {state['Status']}:\n{self.logs(name)}")
            return state["Health"]["Status"] == "healthy"

        try:
            wait_until(f"{name} is healthy", healthy)
        except Exception as error:
            raise CommandError(f"{error}\n{self.logs(name)}") from error

    def logs(self, name: str) -> str:
        done = subprocess.run(
            ["docker", "logs", "--tail", "30", name],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
        return done.stdout

    def has_image(self, name: str) -> bool:
        return bool(self.docker("image", "ls", "--quiet", name).strip())


def engine() -> Iterator[Engine]:
    """The engine of DOCKER_HOST or of the current context; else one that lives as long as this run."""
    given = os.environ.get("DOCKER_HOST")
    if shutil.which("docker"):
        host = given or command(["docker", "context", "inspect", "--format", "{{.Endpoints.docker.Host}}"]).strip()
        # Containers get its socket and directories of this machine.
        if not host.startswith("unix://"):
            missing(f"needs an engine of this machine, on a Unix socket, not {host}: set DOCKER_HOST")
        here = Engine(host)
        if here.answers():
            yield here
            return
    if given:
        missing(f"no Docker engine answers at DOCKER_HOST={given}")
    if os.geteuid() != 0:
        missing("no Docker engine answers, and only root may start one: start one, or set DOCKER_HOST")
    # The package holds the command too.
    installed("dockerd", "docker.io iptables")
    installed("docker", "docker.io")
    yield from own_engine()


def own_engine() -> Iterator[Engine]:
    # Its images are kept from run to run: they take minutes to make. A second run at the same time waits.
    home = CACHE / "dockerd"
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock, tempfile.TemporaryDirectory(prefix="keybrake-") as run:
        fcntl.flock(lock, fcntl.LOCK_EX)
        host = f"unix://{run}/docker.sock"
        directories = ["--data-root", str(home / "data"), "--exec-root", f"{run}/exec", "-p", f"{run}/pid"]
        child = Child(["dockerd", *directories, "-H", host], {}, home / "log")
        try:
            ours = Engine(host)

            def up() -> bool:
                child.must_run("dockerd")
                return ours.answers()

            wait_until("dockerd answers", up, ENGINE_START_TIMEOUT_S)
            yield ours
        finally:
            child.stop()


class Compose:
    """`docker compose` with a list of files, as one project."""

    def __init__(self, program: list[str], engine: Engine) -> None:
        self._program = program
        self.engine = engine

    def run(
        self,
        files: list[Path],
        *arguments: str,
        project: str,
        settings: dict[str, str],
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> str:
        named = [argument for file in files for argument in ("--file", str(file))]
        environment = {**self.engine.environment, **settings}
        return command(
            [*self._program, "--project-name", project, *named, *arguments], environment, timeout_s=timeout_s
        )


def compose(engine: Engine) -> Compose:
    """The plugin that is here; else the same program, built from its source."""
    try:
        engine.docker("compose", "version")
        return Compose(["docker", "compose"], engine)
    except CommandError:
        return Compose([str(built_compose())], engine)


def built_compose() -> Path:
    """Its releases come from elsewhere; its source comes from the Go module proxy like any module."""
    program = CACHE / f"docker-compose-{COMPOSE_VERSION}"
    if program.exists():
        return program
    print(f"test-docker: building compose {COMPOSE_VERSION} (once, some minutes)", file=sys.stderr, flush=True)
    environment = {**os.environ, "GOMODCACHE": str(CACHE / "go" / "modules"), "GOCACHE": str(CACHE / "go" / "build")}
    go = setup.go_program(Path(sys.executable))
    module = Path(__file__).resolve().parent / "compose"
    version = f"-X {COMPOSE_MODULE}/internal.Version={COMPOSE_VERSION}"
    unfinished = program.with_suffix(".new")
    build = [go, "build", "-buildvcs=false", "-modcacherw", "-trimpath", "-ldflags", f"-s -w {version}"]
    try:
        command(
            [*build, "-o", str(unfinished), f"{COMPOSE_MODULE}/cmd"],
            environment,
            timeout_s=BUILD_TIMEOUT_S,
            cwd=module,
        )
    except CommandError as error:
        missing(f"there is no `docker compose`, and it cannot be built: {error}")
    unfinished.rename(program)
    return program
