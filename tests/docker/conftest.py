"""The image, built once, and for each test a stage of its own: names, secrets, and a stand-in for Stripe."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "py"), str(HERE.parent / "sdk"), str(HERE)]

import bases  # noqa: E402
import engine as engines  # noqa: E402
import relay  # noqa: E402
from engine import BUILD_TIMEOUT_S, Compose, Engine, command  # noqa: E402
from rig.process import REPO, free_port, within  # noqa: E402
from rig.standin import Standin  # noqa: E402

TEST_TIMEOUT_S = 300
IMAGE = f"{bases.OURS}/keybrake"
TASK_IMAGE = f"{bases.OURS}/task"
DEMO_TASK = HERE.parent / "demo" / "task_idempotent_vault.py"
# The task of the demo, with the price list that it reads from a file.
TASK_COMMAND = ["sh", "-c", 'echo "$PRICES" >"$PRICE_LIST" && exec python3 /test/task_idempotent_vault.py']
# What the README tells to run a sidecar with.
NOTHING_GRANTED = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
BOUNDS = [
    *["--name", "billing", "--label-prefix", "kestra-", "--allow", "POST /v1/charges", "--max-cap-usd", "1000"],
    *["--daily-usd-cap", "5000", "--max-expires-in", "3600", "--expires-in", "86400"],
]
STRIPE_BASE = f"http://127.0.0.1:{relay.PORT}"


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    yield from engines.engine()


@pytest.fixture(scope="session")
def compose(engine: Engine) -> Compose:
    return engines.compose(engine)


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """Built as users build it, or the one that KEYBRAKE_TEST_IMAGE names."""
    given = os.environ.get("KEYBRAKE_TEST_IMAGE")
    if given:
        return given
    print("test-docker: building the image (minutes, unless nothing has changed)", file=sys.stderr, flush=True)
    make = ["make", "image", f"IMAGE={IMAGE}", f"RUST={bases.rust(engine)}"]
    command(make, engine.environment, timeout_s=BUILD_TIMEOUT_S, cwd=REPO)
    return IMAGE


@pytest.fixture(scope="session")
def task_image(engine: Engine) -> str:
    base = bases.debian(engine)
    with tempfile.TemporaryDirectory() as directory:
        context = Path(directory)
        # Of the virtual environment that these tests run in. What is compiled in it has a double in Python.
        site = next(Path(path) for path in sys.path if path.endswith("site-packages"))
        compiled = shutil.ignore_patterns("*.so", "__pycache__", "pip", "setuptools")
        shutil.copytree(site, context / "site-packages", ignore=compiled)
        (context / "scripts").mkdir()
        for script in (HERE / "worker.py", HERE / "relay.py", HERE / "client.py", DEMO_TASK):
            shutil.copy(script, context / "scripts")
        build = ["build", "--file", str(HERE / "Dockerfile.task"), "--build-arg", f"BASE={base}", "--tag", TASK_IMAGE]
        engine.docker(*build, directory, timeout_s=BUILD_TIMEOUT_S)
    return TASK_IMAGE


@pytest.fixture(scope="session")
def postgres_image(engine: Engine) -> str:
    return bases.postgres(engine)


@dataclass
class Stage:
    """Everything of one test is under one name, so that it meets nothing that is on the engine already."""

    engine: Engine
    image: str
    task_image: str
    standin: Standin
    directory: Path
    name: str = field(default_factory=lambda: f"kbtest-{secrets.token_hex(4)}")

    def __post_init__(self) -> None:
        self.secrets = self.directory / "secrets"
        self.secrets.mkdir(mode=0o700)
        self.admin_key = secrets.token_hex(32)
        self.tokens = [secrets.token_hex(32), secrets.token_hex(32)]
        self.query_key = secrets.token_hex(32)
        self.ledger_password = secrets.token_hex(32)
        for name, text in {
            "admin_key": self.admin_key,
            "stripe_key": self.standin.secret_key,
            "token_1": self.tokens[0],
            "token_2": self.tokens[1],
            "tokens": f"worker-1 {self.tokens[0]}\nworker-2 {self.tokens[1]}",
            "query_key": self.query_key,
            "ledger_password": self.ledger_password,
        }.items():
            self.secret(name, text)

    def secret(self, name: str, text: str, mode: int = 0o444) -> Path:
        path = self.secrets / name
        path.unlink(missing_ok=True)
        path.write_text(f"{text}\n")
        path.chmod(mode)
        return path

    # Without compose.

    @property
    def volumes(self) -> list[str]:
        return ["--volume", f"{self.name}-data:/data", "--volume", f"{self.name}-ca:/ca"]

    def start_sidecar(self, *options: str) -> str:
        """A sidecar as the README has it. Returns the container's name; it is not ready yet."""
        name = f"{self.name}-sidecar"
        mounts = [
            part
            for secret in ("admin_key", "stripe_key")
            for part in ("--volume", f"{self.secrets / secret}:/run/secrets/{secret}:ro")
        ]
        settings = {
            "KEYBRAKE_ADMIN_KEY_FILE": "/run/secrets/admin_key",
            "KEYBRAKE_STRIPE_SECRET_KEY_FILE": "/run/secrets/stripe_key",
            "KEYBRAKE_STRIPE_API_BASE": STRIPE_BASE,
        }
        given = [part for pair in settings.items() for part in ("--env", "=".join(pair))]
        run = ["run", "--detach", "--name", name, *NOTHING_GRANTED, *self.volumes, *mounts, *given, *options]
        self.engine.docker(*run, self.image)
        return name

    def start_stripe(self, sidecar: str) -> None:
        """Stripe as this sidecar knows it."""
        run = ["run", "--detach", "--name", f"{sidecar}-stripe", "--network", f"container:{sidecar}"]
        mount = ["--volume", f"{self.directory / 'stripe'}:/stripe", "--entrypoint", "python3"]
        self.engine.docker(*run, *mount, self.task_image, "/test/relay.py", "/stripe/socket")

    def ready_sidecar(self, *options: str) -> str:
        name = self.start_sidecar(*options)
        self.start_stripe(name)
        self.engine.wait_healthy(name)
        return name

    def end(self, sidecar: str) -> None:
        self.engine.docker("rm", "--force", sidecar, f"{sidecar}-stripe")

    def issuer_key(self, sidecar: str, *arguments: str) -> str:
        """Made as the README tells: with the program in the container, which knows its own admin key."""
        told = self.engine.docker("exec", sidecar, "/keybrake", "issuers", "create", *BOUNDS, "--json", *arguments)
        return json.loads(told)["issuer_key"]

    def audit(self, sidecar: str, *filters: str) -> list[dict[str, Any]]:
        told = self.engine.docker("exec", sidecar, "/keybrake", "audit", "query", "--json", *filters)
        return json.loads(told)["data"]

    def task(self, sidecar: str, issuer_key: str, customer: str) -> subprocess.Popen[str]:
        """A billing task in the sidecar's network; the caller waits for it."""
        given = {
            "KEYBRAKE_URL": "https://localhost:8443",
            "KEYBRAKE_CA": "/keybrake-ca/ca.pem",
            "KEYBRAKE_ISSUER_KEY": issuer_key,
            **billing(customer),
        }
        settings = [part for pair in given.items() for part in ("--env", "=".join(pair))]
        where = ["--network", f"container:{sidecar}", "--volume", f"{self.name}-ca:/keybrake-ca:ro"]
        run = ["docker", "run", "--rm", *where, *settings, "--entrypoint", "sh", self.task_image, *TASK_COMMAND[1:]]
        return subprocess.Popen(
            run,
            env=self.engine.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    # With compose.

    def settings(self) -> dict[str, str]:
        return {
            "KEYBRAKE_IMAGE": self.image,
            "KEYBRAKE_TASK_IMAGE": self.task_image,
            "KESTRA_IMAGE": self.task_image,
            "POSTGRES_IMAGE": self.task_image,
            "KEYBRAKE_CONTAINER": f"{self.name}-sidecar",
            "KEYBRAKE_CA_VOLUME": f"{self.name}-ca",
            "KEYBRAKE_NETWORK": f"{self.name}-tasks",
            "KEYBRAKE_SECRETS": str(self.secrets),
            "KEYBRAKE_STRIPE_API_BASE": STRIPE_BASE,
            "KESTRA_PORT": str(free_port()),
            "DOCKER_SOCKET": self.engine.socket,
            "STAGE": str(self.directory),
        }


def billing(customer: str) -> dict[str, str]:
    return {
        "BILLING_PERIOD": "2026-07",
        "ITEMS": json.dumps([{"id": customer, "amount_cents": 2999}]),
        "PRICE_LIST": "/tmp/prices",
        "PRICES": json.dumps({customer: 2999}),
    }


def said_by(task: subprocess.Popen[str]) -> str:
    """What a task that has to succeed printed."""
    output, _ = task.communicate(timeout=60)
    assert task.returncode == 0, output
    return output.strip()


@dataclass
class Project:
    """One compose project on a stage."""

    stage: Stage
    compose: Compose
    files: list[Path]
    settings: dict[str, str]

    def run(self, *arguments: str) -> str:
        return self.compose.run(self.files, *arguments, project=self.stage.name, settings=self.settings)

    def up(self) -> None:
        self.run("up", "--detach", "--quiet-pull")

    def give_issuer_key(self, sidecar: str, variable: str = "SECRET_KEYBRAKE_ISSUER_KEY") -> None:
        """As an operator does: mint it, give it to Kestra, start Kestra with it."""
        key = self.stage.issuer_key(sidecar)
        self.settings[variable] = base64.b64encode(key.encode()).decode()
        self.up()

    def task(self, customer: str, network: str, worker: str = "kestra", command: list[str] | None = None) -> str:
        """What a task of the Docker runner prints that this worker is given."""
        task = {
            "command": command or TASK_COMMAND,
            "env": billing(customer),
            "network": network,
            "volumes": [f"{self.settings['KEYBRAKE_CA_VOLUME']}:/keybrake-ca:ro"],
            "label": self.stage.name,
        }
        return self.run("exec", "-T", worker, "python3", "/test/worker.py", "task", json.dumps(task)).strip()


@pytest.fixture
def stage(engine: Engine, image: str, task_image: str) -> Iterator[Stage]:
    yield from make_stage(engine, image, task_image)


@pytest.fixture
def slow_stage(engine: Engine, image: str, task_image: str) -> Iterator[Stage]:
    """Stripe takes its time."""
    yield from make_stage(engine, image, task_image, latency_ms=3_000)


def make_stage(engine: Engine, image: str, task_image: str, latency_ms: int = 0) -> Iterator[Stage]:
    # A short path: that of a socket may have a hundred characters.
    with tempfile.TemporaryDirectory(prefix="kb-") as directory, Standin(Path(directory), latency_ms) as standin:
        with stripe_socket(Path(directory), standin.url):
            stage = Stage(engine, image, task_image, standin, Path(directory))
            try:
                yield stage
            finally:
                remove_all(engine, stage.name)


def remove_all(engine: Engine, name: str) -> None:
    """Whatever is left of a stage, by its name."""
    for kind, remove in (("ps --all", "rm --force --volumes"), ("volume ls", "volume rm"), ("network ls", "network rm")):
        found = engine.docker(*kind.split(), "--quiet", "--filter", f"name={name}").split()
        if found:
            engine.docker(*remove.split(), *found)


@contextlib.contextmanager
def stripe_socket(directory: Path, url: str) -> Iterator[None]:
    home = directory / "stripe"
    home.mkdir()
    host, port = url.removeprefix("http://").split(":")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "socket"))
        (home / "socket").chmod(stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO)
        listener.listen()

        def connect() -> socket.socket:
            return socket.create_connection((host, int(port)))

        threading.Thread(target=relay.serve, args=(listener, connect), daemon=True).start()
        yield


@pytest.fixture
def customer() -> str:
    return f"cus_{secrets.token_hex(8)}"


@pytest.fixture(autouse=True)
def deadline(compose: Compose, image: str, task_image: str) -> Iterator[None]:
    """No test may hang, whatever it waits for. What is made once for all has its own limits and comes before."""
    with within(TEST_TIMEOUT_S):
        yield
