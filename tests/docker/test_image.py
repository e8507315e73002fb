"""The image: what is in it, what it can do with nothing granted, and what outlives its containers."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

from conftest import Stage, said_by
from engine import Engine
from rig.process import built, wait_until

IMAGE_BYTES_MAX = 24_000_000
# Only the stand-in knows this path: its control API.
STANDIN_MARK = b"/_standin/"
# What an engine puts into each container.
OF_THE_ENGINE = {".dockerenv", "dev", "etc", "proc", "sys"}


def test_it_holds_the_program_and_nothing_else(stage: Stage) -> None:
    engine = stage.engine
    config = engine.inspect(stage.image)
    assert config["Size"] < IMAGE_BYTES_MAX
    assert config["Config"]["User"] == "65532:65532"
    assert config["Config"]["Healthcheck"]["Test"] == ["CMD", "/keybrake", "health"]

    engine.docker("create", "--name", f"{stage.name}-files", stage.image)
    with tempfile.TemporaryDirectory() as directory:
        archive = Path(directory) / "files.tar"
        engine.docker("export", "--output", str(archive), f"{stage.name}-files")
        with tarfile.open(archive) as files:
            held = {member.name.split("/")[0]: member for member in files}
            assert set(held) - OF_THE_ENGINE == {"keybrake", "data", "ca"}
            assert (held["data"].uid, held["data"].mode & 0o777) == (65532, 0o700)
            program = files.extractfile("keybrake")
            assert program
            assert STANDIN_MARK not in program.read()
    assert STANDIN_MARK in built("examples/stripe-standin").read_bytes()


def test_a_charge_is_remembered_by_the_next_container(stage: Stage, customer: str) -> None:
    first = stage.ready_sidecar()
    granted = stage.engine.inspect(first)["HostConfig"]
    assert (granted["ReadonlyRootfs"], granted["CapDrop"], granted["Privileged"]) == (True, ["ALL"], False)
    key = stage.issuer_key(first)
    charged = said_by(stage.task(first, key, customer))
    stage.end(first)

    second = stage.ready_sidecar()
    # The issuer key is in the ledger, and tasks trust the same CA.
    assert said_by(stage.task(second, key, customer)) == charged
    assert len(stage.standin.executed(customer)) == 1
    outcomes = [row["outcome"] for row in stage.audit(second, f"customer={customer}", "decision=forwarded")]
    assert outcomes == ["spent"]


def test_it_is_healthy_only_when_it_can_charge(stage: Stage) -> None:
    sidecar = stage.start_sidecar()
    health = ["docker", "exec", sidecar, "/keybrake", "health"]

    def asked() -> subprocess.CompletedProcess[str]:
        return subprocess.run(health, env=stage.engine.environment, capture_output=True, text=True, timeout=30)

    wait_until("the sidecar answers", lambda: "not ready" in asked().stderr)
    # Nobody has told it yet whose account this is.
    assert asked().returncode == 1
    assert stage.engine.health(sidecar) == "starting"
    stage.start_stripe(sidecar)
    stage.engine.wait_healthy(sidecar)
    assert asked().returncode == 0


def test_sigterm_lets_a_charge_end_first(slow_stage: Stage, customer: str) -> None:
    stage = slow_stage
    sidecar = stage.ready_sidecar()
    task = stage.task(sidecar, stage.issuer_key(sidecar), customer)
    sent = f"customer={customer}"
    wait_until("the charge is on its way", lambda: [r for r in stage.standin.requests() if sent in r["body"]])
    began = time.monotonic()
    stage.engine.docker("stop", "--time", "10", sidecar)
    # SIGKILL would have come after ten seconds, and left 137.
    assert time.monotonic() - began < 10
    assert stage.engine.inspect(sidecar)["State"]["ExitCode"] == 0
    assert re.search(rf"{customer} ch_\w+", said_by(task))


def ended(engine: Engine, sidecar: str) -> int:
    wait_until("the sidecar ends", lambda: engine.inspect(sidecar)["State"]["Status"] == "exited")
    return engine.inspect(sidecar)["State"]["ExitCode"]


def test_secrets_that_it_may_not_read_are_named_with_its_uid(stage: Stage) -> None:
    for name in ("admin_key", "stripe_key"):
        (stage.secrets / name).chmod(0o600)
    sidecar = stage.start_sidecar()
    assert ended(stage.engine, sidecar) == 64
    logs = stage.engine.logs(sidecar)
    for variable in ("KEYBRAKE_ADMIN_KEY_FILE", "KEYBRAKE_STRIPE_SECRET_KEY_FILE"):
        assert re.search(rf"^{variable}: \S+ cannot be read by uid 65532: Permission denied", logs, re.MULTILINE)


def test_secrets_may_be_its_own(stage: Stage) -> None:
    if os.geteuid() == 0:
        for name in ("admin_key", "stripe_key"):
            os.chown(stage.secrets / name, 65532, 65532)
            (stage.secrets / name).chmod(0o400)
    stage.ready_sidecar()


def test_tokens_that_a_collector_may_not_read_are_named_with_its_uid(stage: Stage) -> None:
    (stage.secrets / "tokens").chmod(0o600)
    name = f"{stage.name}-collector"
    mount = f"{stage.secrets / 'tokens'}:/run/secrets/tokens:ro"
    setting = "KEYBRAKE_COLLECT_TOKENS_FILE=/run/secrets/tokens"
    stage.engine.docker("run", "--detach", "--name", name, "--volume", mount, "--env", setting, stage.image, "collect")
    assert ended(stage.engine, name) == 64
    told = "KEYBRAKE_COLLECT_TOKENS_FILE: cannot be read by uid 65532: Permission denied"
    assert told in stage.engine.logs(name)


def test_a_directory_that_it_may_not_write_is_named(stage: Stage) -> None:
    # A directory of the host's in place of a volume, as it is after `mkdir`.
    data = stage.directory / "data"
    data.mkdir(mode=0o755)
    sidecar = stage.start_sidecar("--volume", f"{data}:/elsewhere", "--env", "KEYBRAKE_DATA_DIR=/elsewhere")
    assert ended(stage.engine, sidecar) == 1
    assert "/elsewhere/keybrake.redb: Permission denied" in stage.engine.logs(sidecar)
