"""Base images: pulled where a registry answers, else made from Debian packages and the Rust that is here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from engine import CACHE, INSTALL_TIMEOUT_S, PULL_TIMEOUT_S, CommandError, Engine, command, installed, missing
from rig.process import REPO

HERE = Path(__file__).resolve().parent
SUITE = "bookworm"
DEBIAN = f"debian:{SUITE}-slim"
# Not under the name of the image that it stands for: that one may be wanted later on the same engine.
OURS = "keybrake-test"
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")


def rust(engine: Engine) -> str:
    """What the image is built in: the default of its Dockerfile, or a stand-in for it."""
    dockerfile = (REPO / "docker" / "Dockerfile").read_text()
    default = re.search(r"^ARG RUST=(.+)$", dockerfile, re.MULTILINE)
    assert default, "the Dockerfile names the image that it builds in"
    return pulled(engine, default[1]) or made(
        engine, f"{OURS}/rust", "gcc,libc6-dev,ca-certificates,musl-tools,binutils", with_rust=True
    )


def debian(engine: Engine) -> str:
    """What tasks and stand-ins run in. It has Python, which needs no compiler to be there."""
    own = f"{OURS}/python"
    if engine.has_image(own):
        return own
    if pulled(engine, DEBIAN):
        name = f"{OURS}-python-{os.getpid()}"
        install = "apt-get update && apt-get install -y --no-install-recommends python3"
        engine.docker("run", "--name", name, DEBIAN, "sh", "-c", install, timeout_s=INSTALL_TIMEOUT_S)
        try:
            engine.docker("commit", name, own)
        finally:
            engine.docker("rm", name)
        return own
    return made(engine, own, "python3")


def postgres(engine: Engine) -> str:
    """Kestra's database: the default of the compose file, or a stand-in that starts as that does."""
    fleet = (REPO / "docker" / "compose.fleet.yaml").read_text()
    default = re.search(r"\$\{POSTGRES_IMAGE:-(.+)\}$", fleet, re.MULTILINE)
    assert default, "the compose file names the image of the database"
    if pulled(engine, default[1]):
        return default[1]
    own = f"{OURS}/postgres"
    build = ["build", "--file", str(HERE / "Dockerfile.postgres"), "--build-arg", f"BASE={debian(engine)}"]
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(HERE / "postgres.sh", directory)
        engine.docker(*build, "--tag", own, directory, timeout_s=INSTALL_TIMEOUT_S)
    return own


def pulled(engine: Engine, name: str) -> str | None:
    if not engine.has_image(name):
        try:
            engine.docker("pull", name, timeout_s=PULL_TIMEOUT_S)
        except (CommandError, subprocess.TimeoutExpired):
            return None
    return name


def made(engine: Engine, name: str, packages: str, *, with_rust: bool = False) -> str:
    if engine.has_image(name):
        return name
    if os.geteuid() != 0:
        missing(f"no registry answers, and only root can make {name} from Debian packages")
    installed("debootstrap", "debootstrap")
    print(f"test-docker: making {name} from Debian packages (once)", file=sys.stderr, flush=True)
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="base-", dir=CACHE) as directory:
        root = Path(directory)
        # As unpacked it may be entered by its owner only, and so would be the `/` of the image.
        root.chmod(0o755)
        options = ["--variant=minbase", f"--include={packages}"]
        try:
            command(["debootstrap", *options, SUITE, str(root)], timeout_s=INSTALL_TIMEOUT_S)
        except CommandError as error:
            missing(f"no registry answers, and {name} cannot be made: {error}")
        changes = copy_rust(root) if with_rust else []
        import_tree(engine, root, name, changes)
    return name


def copy_rust(root: Path) -> list[str]:
    """The toolchain of this machine, in the places of the official image. Returns what its settings are."""
    if not shutil.which("rustup"):
        missing("no registry answers, and without rustup there is no toolchain to build the image with")
    described = command(["rustc", "--version", "--verbose"])
    version, triple = (re.search(rf"^{field}: (.+)$", described, re.MULTILINE) for field in ("release", "host"))
    assert version and triple
    name = f"{version[1]}-{triple[1]}"
    toolchain = root / "usr/local/rustup/toolchains" / name
    left_out = shutil.ignore_patterns("doc", "man")
    # Its own directory may be a link.
    sysroot = Path(command(["rustc", "--print", "sysroot"]).strip())
    shutil.copytree(sysroot.resolve(), toolchain, symlinks=False, ignore=left_out)
    cargo_home = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")
    shutil.copytree(cargo_home / "bin", root / "usr/local/cargo/bin", symlinks=True)
    # Where this machine has its crates from.
    for settings in ("config.toml", "config"):
        if (cargo_home / settings).is_file():
            shutil.copy(cargo_home / settings, root / "usr/local/cargo" / settings)
    (root / "usr/local/rustup/settings.toml").write_text(
        f'version = "12"\ndefault_toolchain = "{name}"\nprofile = "minimal"\n'
    )
    if AUTHORITIES.is_file():
        # A machine that trusts one more authority does so for a reason.
        shutil.copy(AUTHORITIES, root / AUTHORITIES.relative_to("/"))
    path = "PATH=/usr/local/cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return [f"ENV {path} RUSTUP_HOME=/usr/local/rustup CARGO_HOME=/usr/local/cargo"]


def import_tree(engine: Engine, root: Path, name: str, changes: list[str]) -> None:
    told = [argument for change in changes for argument in ("--change", change)]
    tar = subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE)
    try:
        subprocess.run(
            ["docker", "import", *told, "-", name],
            env=engine.environment,
            stdin=tar.stdout,
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=INSTALL_TIMEOUT_S,
        )
    finally:
        if tar.stdout:
            tar.stdout.close()
        tar.wait(INSTALL_TIMEOUT_S)
    if tar.returncode != 0:
        raise CommandError(f"tar ended with exit code {tar.returncode}")
