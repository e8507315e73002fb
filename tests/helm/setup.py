#!/usr/bin/env python3
"""Makes a virtual environment with Helm's engine and Kubernetes' schemas, once; prints the path of its interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sdk"))

from setup import PIP, check_python, once, run, say, this_python  # noqa: E402


def helm_home() -> Path:
    """The directory of a virtual environment in which requirements.txt is installed."""
    requirements = HERE / "requirements.txt"

    def build(home: Path) -> None:
        say(f"installing Helm's engine into {home} (once)")
        run([sys.executable, "-m", "venv", str(home)])
        run([str(home / "bin" / "python"), *PIP, "install", "--requirement", str(requirements)])

    return once("helm", build, *this_python(), requirements)


def main() -> None:
    check_python()
    if sys.version_info < (3, 10):
        sys.exit(f"setup: Helm's engine needs Python 3.10 or later; this is {sys.version.split()[0]}")
    print(helm_home() / "bin" / "python")


if __name__ == "__main__":
    main()
