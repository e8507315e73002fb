#!/usr/bin/env python3
"""Makes a virtual environment with Helm's engine and Kubernetes' schemas, once; prints the path of its interpreter.

    setup.py --kubernetes  also Kubernetes' own programs, built from its Go module; prints their directory
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sdk"))

from setup import CACHE, PIP, answer, check_python, go_program, once, run, say, this_python  # noqa: E402

KUBERNETES = "1.34.4"
PROGRAMS = ("kubelet", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
# Of one program, on a machine that has other work too.
BUILD_TIMEOUT_S = 3600


def helm_home() -> Path:
    """The directory of a virtual environment in which requirements.txt is installed."""
    requirements = HERE / "requirements.txt"

    def build(home: Path) -> None:
        say(f"installing Helm's engine into {home} (once)")
        run([sys.executable, "-m", "venv", str(home)])
        run([str(home / "bin" / "python"), *PIP, "install", "--requirement", str(requirements)])

    return once("helm", build, *this_python(), requirements)


def kubernetes_home(python: Path) -> Path:
    """The directory of the programs. A quarter of an hour on two cores, and 6 GB of cache."""
    go = go_program(python)
    environment = {
        **os.environ,
        "GOTOOLCHAIN": "local",
        "GOMODCACHE": str(CACHE / "go" / "modules"),
        "GOCACHE": str(CACHE / "go" / "build"),
        "GOFLAGS": "-mod=mod -modcacherw",
    }

    def build(home: Path) -> None:
        say(f"building Kubernetes {KUBERNETES} into {home} (once)")
        module = f"k8s.io/kubernetes@v{KUBERNETES}"
        described = answer([go, "mod", "download", "-json", module], environment)
        (home / "go.mod").write_text(main_module(Path(json.loads(described)["GoMod"]).read_text()))
        imports = [f'_ "k8s.io/kubernetes/cmd/{name}/app"' for name in PROGRAMS if name != "kubectl"]
        (home / "programs.go").write_text("\n".join(["package programs", "import (", *imports, ")", ""]))
        version = "k8s.io/component-base/version"
        major, minor, _ = KUBERNETES.split(".")
        stamps = {"gitVersion": f"v{KUBERNETES}", "gitMajor": major, "gitMinor": minor}
        flags = " ".join(["-s -w", *(f"-X {version}.{name}={value}" for name, value in stamps.items())])
        for name in PROGRAMS:
            command = [go, "build", "-trimpath", "-ldflags", flags, "-o", str(home / name)]
            command.append(f"k8s.io/kubernetes/cmd/{name}")
            subprocess.run(command, cwd=home, env=environment, check=True, stdout=sys.stderr, timeout=BUILD_TIMEOUT_S)

    return once("kubernetes", build, KUBERNETES, answer([go, "version"], environment))


def main_module(theirs: str) -> str:
    """Kubernetes' parts are modules of their own, which its go.mod finds in its tree: here they are pinned instead."""
    parts = re.findall(r"^\t(k8s\.io/[a-z0-9-]+) v0\.0\.0$", theirs, re.MULTILINE)
    version = "v0." + KUBERNETES.split(".", 1)[1]
    pins = [f"replace {part} => {part} {version}" for part in parts]
    return "\n".join(["module programs", "go 1.24.0", f"require k8s.io/kubernetes v{KUBERNETES}", *pins, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kubernetes", action="store_true", help="Kubernetes' own programs too")
    arguments = parser.parse_args()
    check_python()
    if sys.version_info < (3, 10):
        sys.exit(f"setup: Helm's engine needs Python 3.10 or later; this is {sys.version.split()[0]}")
    python = helm_home() / "bin" / "python"
    print(python)
    if arguments.kubernetes:
        print(kubernetes_home(python))


if __name__ == "__main__":
    main()
