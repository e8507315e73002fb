"""The flows of the Docker task runner on the real Kestra engine: each task in a container beside the sidecar's."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, Iterator

import pytest
from conftest import Stage
from rig.engine import EmbeddedKestra
from rig.process import REPO, wait_until

KESTRA = REPO / "kestra"
NAMESPACE = "company.billing"
EXECUTION_TIMEOUT_S = 120
# What happens after the charge; a container has nothing else that it shares with the test.
BOOKKEEPING = """
import os, time
def record(line_id, charge_id):
    print(line_id, charge_id, flush=True)
    if "attempt=0" in os.environ["KEYBRAKE_CONTEXT"].split():
        if line_id.startswith("fails"):
            raise ConnectionError("the database is down")
        if line_id.startswith("lasts"):
            time.sleep(600)
"""


class Worker:
    """A Kestra whose tasks run on the engine of a stage, next to the stage's sidecar."""

    def __init__(self, stage: Stage, version: str, sidecar: str, url: str, workdir: Path) -> None:
        self.stage = stage
        environment = {
            "ENV_KEYBRAKE_URL": url,
            "ENV_KEYBRAKE_CA": "/keybrake-ca/ca.pem",
            "ENV_KEYBRAKE_CONTAINER": sidecar,
            "ENV_KEYBRAKE_TASK_IMAGE": stage.task_image,
            "SECRET_KEYBRAKE_ISSUER_KEY": base64.b64encode(stage.issuer_key(sidecar).encode()).decode(),
        }
        self.kestra = EmbeddedKestra(version, workdir, environment)
        for name in ("keybrake.py", "prices.json"):
            self.kestra.put_file(NAMESPACE, name, (KESTRA / "files" / name).read_bytes())
        self.kestra.put_file(NAMESPACE, "bookkeeping.py", BOOKKEEPING.encode())

    def load(self, name: str) -> None:
        """A flow as it is, but for its pace, and for the names that this stage has for the engine and what is on it."""
        source = (KESTRA / "flows" / self.kestra.dialect / f"{name}.yaml").read_text()
        runner = "type: io.kestra.plugin.scripts.runner.docker.Docker\n"
        for ours, of_stage in (
            (runner, f"{runner}      host: unix://{self.stage.engine.socket}\n"),
            ('["keybrake-ca:', f'["{self.stage.name}-ca:'),
            ("networkMode: keybrake-tasks", f"networkMode: {self.stage.name}-tasks"),
            ("PT15S", "PT1S"),
        ):
            source = source.replace(ours, of_stage)
        self.kestra.load(source)

    def start(self, flow: str, line: dict[str, Any]) -> str:
        return self.kestra.run(NAMESPACE, flow, {"line": json.dumps(line).encode()})

    def ended(self, execution: str) -> str:
        return self.kestra.wait(execution, EXECUTION_TIMEOUT_S).state

    def running(self, execution: str) -> list[str]:
        """Containers of this execution, by the label that Kestra gives them."""
        label = f"label=kestra.io/execution-id={execution}"
        return self.stage.engine.docker("ps", "--quiet", "--filter", label).split()


def line_of(name: str, customer: str) -> dict[str, Any]:
    return {"line_id": f"{name}-{customer}", "customer": f"{customer}{name}", "plan": "pro", "cents": 2999}


@pytest.fixture(params=["1.3.31", "2.0.0"])
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def beside(stage: Stage, version: str, tmp_path: Path) -> Iterator[Worker]:
    """The documented default: a task's container shares the network of the sidecar's."""
    sidecar = stage.ready_sidecar()
    worker = Worker(stage, version, sidecar, "https://localhost:8443", tmp_path)
    with worker.kestra:
        worker.load("charge_docker")
        yield worker


def test_a_container_that_is_retried_replayed_or_left_behind_charges_once(beside: Worker, customer: str) -> None:
    stage, kestra = beside.stage, beside.kestra
    fails = line_of("fails", customer)
    execution = beside.start("charge_docker", fails)
    assert beside.ended(execution) == "SUCCESS", kestra.logs(execution)
    assert beside.ended(kestra.replay(execution)) == "SUCCESS"
    assert len(stage.standin.executed(fails["customer"])) == 1

    lasts = line_of("lasts", customer)
    execution = beside.start("charge_docker", lasts)
    wait_until("the charge was made", lambda: stage.standin.executed(lasts["customer"]), EXECUTION_TIMEOUT_S)
    left = beside.running(execution)
    assert len(left) == 1
    kestra.crash()
    kestra.start()
    try:
        assert beside.ended(execution) == "SUCCESS", kestra.logs(execution)
        # The old container is still there, with a key that works.
        assert beside.running(execution) == left
    finally:
        stage.engine.docker("rm", "--force", *left)
    assert len(stage.standin.executed(lasts["customer"])) == 1
    rows = stage.audit(f"{stage.name}-sidecar", f"customer={lasts['customer']}")
    assert [row["decision"] for row in rows] == ["replayed", "forwarded"]
    assert {row["metadata"]["execution"] for row in rows} == {execution}


def test_on_a_network_of_its_own_a_container_charges_once(stage: Stage, version: str, customer: str, tmp_path: Path) -> None:
    network = f"{stage.name}-tasks"
    nowhere = ["--internal", "--opt", "com.docker.network.bridge.inhibit_ipv4=true"]
    stage.engine.docker("network", "create", *nowhere, network)
    names = {"KEYBRAKE_LISTEN": "0.0.0.0:8443", "KEYBRAKE_TLS_NAMES": "keybrake,localhost,127.0.0.1"}
    settings = [part for pair in names.items() for part in ("--env", "=".join(pair))]
    sidecar = stage.ready_sidecar("--network", network, "--network-alias", "keybrake", *settings)
    worker = Worker(stage, version, sidecar, "https://keybrake:8443", tmp_path)
    with worker.kestra:
        worker.load("charge_docker_alias")
        line = line_of("fails", customer)
        execution = worker.start("charge_docker_alias", line)
        assert worker.ended(execution) == "SUCCESS", worker.kestra.logs(execution)
    assert len(stage.standin.executed(line["customer"])) == 1
