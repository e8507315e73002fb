#!/usr/bin/env python3
"""Makes a virtual environment for the proxies that the sidecar is measured beside, once; prints its interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "sdk"))

from setup import PIP, check_python, once, run, say, this_python  # noqa: E402


def peers_home() -> Path:
    """The directory of a virtual environment in which requirements.txt is installed."""
    requirements = HERE / "requirements.txt"

    def build(home: Path) -> None:
        say(f"installing FastAPI into {home} (once)")
        run([sys.executable, "-m", "venv", str(home)])
        run([str(home / "bin" / "python"), *PIP, "install", "--requirement", str(requirements)])

    return once("peers", build, *this_python(), requirements)


def main() -> None:
    check_python()
    print(peers_home() / "bin" / "python")


if __name__ == "__main__":
    main()
