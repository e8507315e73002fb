"""Kestra's chart with the overlay, installed in a real Kubernetes of one node.

Two things are played: Kestra by a script that asks the sidecar what a worker's tasks would, and Stripe by the stand-in,
one more native sidecar because it listens on loopback only. The worker's deployment with its probes, volumes and
Secrets is what the chart renders, and the database of several workers is a PostgreSQL.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import helm_python as helm
import pytest
import yaml
from rig.http import TIMEOUT_S, call, strict_context
from rig.process import Child, free_port, wait_until

from chart import BASE, HELM, PERSISTENT, POSTGRES, Manifest, Rendered, charts, plain, values
from cluster import POD_TIMEOUT_S, Cluster, Image, missing, seconds
from database import Database, database

STRIPE_KEY = f"rk_test_{secrets.token_hex(12)}"
ADMIN_KEY = secrets.token_hex(32)
STANDIN_PORT = 12111
# As often worker.sh asks before it ends, once a second.
DRAINS = 4
WORKER = "deploy/kestra-worker"
SELECTOR = "app.kubernetes.io/component=worker"
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    lacks = missing()
    if lacks:
        pytest.fail(f"this machine lacks {', '.join(lacks)}")
    programs = Path(os.environ["KEYBRAKE_TEST_KUBERNETES"])
    built = Path(os.environ["KEYBRAKE_TEST_BUILT"])
    keybrake = (built / "keybrake").read_bytes()
    standin = (built / "examples" / "stripe-standin").read_bytes()
    busybox = Path(shutil.which("busybox") or "").read_bytes()
    applets = ("sh", "base64", "cat", "cp", "httpd", "kill", "mkdir", "sleep", "touch")
    images = [
        Image("keybrake:1", {"keybrake": keybrake}, ["/keybrake"], "65532:65532"),
        Image("standin:1", {"standin": standin}, ["/standin"], "65532:65532"),
        Image(
            "kestra/kestra:test",
            {"bin/busybox": busybox, "app/kestra": (HERE / "worker.sh").read_bytes(), "app/keybrake": keybrake},
            [],
            links={f"bin/{name}": "busybox" for name in applets},
        ),
    ]
    with Cluster(programs, tmp_path_factory.mktemp("node"), images) as running:
        yield running


@dataclass
class Release:
    """Kestra's worker in a namespace of its own."""

    cluster: Cluster
    namespace: str
    # What makes the pods.
    worker: str = WORKER

    def kubectl(self, *arguments: str, **options: Any) -> str:
        return self.cluster.kubectl("-n", self.namespace, *arguments, **options)

    def install(self, *overlays: str, ledger: Database | None = None) -> None:
        given = values(*overlays)
        deployments = given["deployments"]
        for name in ("webserver", "executor", "scheduler", "indexer"):
            deployments[name] = {"enabled": False}
        worker = deployments["worker"]
        worker["initContainers"][0]["env"].append(
            {"name": "KEYBRAKE_STRIPE_API_BASE", "value": f"http://127.0.0.1:{STANDIN_PORT}"}
        )
        if ledger:
            # The line that is there for an authority of one's own.
            told = re.search(r"# - (\{name: KEYBRAKE_LEDGER_CA_FILE, .+\})\n", (HELM / POSTGRES).read_text())
            assert told
            worker["initContainers"][0]["env"].append(yaml.safe_load(told[1]))
        standin = {
            "name": "stripe",
            "image": "standin:1",
            "restartPolicy": "Always",
            "args": [f"--listen=127.0.0.1:{STANDIN_PORT}", f"--secret-key={STRIPE_KEY}", "--account=acct_1Test"],
        }
        given["common"] = {"initContainers": [standin]}
        given["image"] = {"tag": "test", "pullPolicy": "Never"}
        self.cluster.kubectl("create", "namespace", self.namespace)
        keys = Rendered(plain("secrets.example.yaml")).named("Secret", "keybrake")
        keys["stringData"] = {"stripe-secret-key": f"{STRIPE_KEY}\n", "admin-key": ADMIN_KEY}
        self.cluster.apply(keys, namespace=self.namespace)
        if ledger:
            way = Rendered(plain("secrets.example.yaml")).named("Secret", "keybrake-ledger")
            way["stringData"] |= {"ledger-url": ledger.url, "ledger-password": f"{ledger.password}\n"}
            way["stringData"]["ledger-ca.pem"] = ledger.authority
            self.cluster.apply(way, namespace=self.namespace)
        if PERSISTENT in overlays:
            self.cluster.apply(*plain("ledger-claim.yaml"), namespace=self.namespace)
        since = time.monotonic()
        with helm.Config(kubeconfig_path=str(self.cluster.kubeconfig), namespace=self.namespace) as config:
            config.install(str(charts()[0]), "kestra", given)
        self.ready()
        seconds(f"{self.namespace}: ready after helm install", since)

    def ready(self) -> None:
        self.kubectl("rollout", "status", self.worker, f"--timeout={POD_TIMEOUT_S:.0f}s", patience_s=POD_TIMEOUT_S)

    def pod(self) -> Manifest:
        """The one pod of the worker that is not on its way out."""
        (pod,) = self.pods()
        return pod

    def named(self, pod: str) -> Manifest:
        return self.cluster.get("-n", self.namespace, "pod", pod)

    def pods(self) -> list[Manifest]:
        pods = self.cluster.get("-n", self.namespace, "pods", "-l", SELECTOR)["items"]
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def log(self, container: str, pod: str = WORKER) -> str:
        return self.kubectl("logs", pod, "-c", container)

    def follow(self, container: str) -> Child:
        name = self.pod()["metadata"]["name"]
        logs = ["-n", self.namespace, "logs", "-f", "--timestamps", name, "-c", container]
        return self.cluster.follow(f"{self.namespace}-{container}", *logs)

    def keybrake(self, *arguments: str, pod: str = WORKER) -> Any:
        """A client command in the sidecar's own container, as an operator gives it."""
        return json.loads(self.kubectl("exec", pod, "-c", "keybrake", "--", "/keybrake", *arguments, "--json"))

    def forwarded(self, pod: str = WORKER) -> Task:
        """A way to the pod's loopback, as a task has it."""
        sidecar, stripe = free_port(), free_port()
        ports = [f"{sidecar}:8443", f"{stripe}:{STANDIN_PORT}"]
        child = self.cluster.follow(f"{self.namespace}-forward", "-n", self.namespace, "port-forward", pod, *ports)

        def listening() -> bool:
            child.must_run("kubectl port-forward")
            return child.log.read_text().count("Forwarding from 127.0.0.1") >= 2

        wait_until("ports are forwarded", listening)
        # Each pod has its own, also in a fleet.
        ca = self.cluster.workdir / f"{self.namespace}-{sidecar}-ca.pem"
        ca.write_text(self.kubectl("exec", pod, "-c", "kestra-worker", "--", "cat", "/etc/keybrake/ca.pem"))
        return Task(f"https://localhost:{sidecar}", ca, f"http://127.0.0.1:{stripe}", child)


@dataclass
class Task:
    """What a task does: it mints a key and charges."""

    url: str
    ca: Path
    stripe: str
    forward: Child

    def mint(self, bearer: str) -> str:
        policy = {
            "label": "kestra-node",
            "vendor": "stripe",
            "allowed_endpoints": ["POST /v1/charges"],
            "daily_usd_cap": "50.00",
            "expires_in_seconds": 3600,
        }
        context = strict_context(self.ca)
        return call("POST", f"{self.url}/admin/vault_keys", policy, bearer=bearer, context=context)["vault_key"]

    def charge(self, vault_key: str, month: str = "2026-07") -> tuple[str, bool]:
        """The charge of a month, always the same: its id, and whether it was answered from memory."""
        form = {"amount": "2999", "currency": "usd", "customer": "cus_9"}
        headers = {"Authorization": f"Bearer {vault_key}", "Idempotency-Key": f"billing:{month}:cus_9"}
        request = urllib.request.Request(f"{self.url}/v1/charges", urllib.parse.urlencode(form).encode(), headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=strict_context(self.ca)) as answer:
            return json.load(answer)["id"], answer.headers["Idempotent-Replayed"] == "true"

    def refused(self, vault_key: str, month: str = "2026-07") -> tuple[int, str]:
        """Status and code of a charge that is not let through."""
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.charge(vault_key, month)
        with caught.value as answer:
            return answer.code, json.load(answer)["error"]["code"]

    def executed(self) -> list[Any]:
        """What the stand-in of this pod has charged."""
        return call("GET", f"{self.stripe}/_standin/executed")["data"]


def test_a_sidecar_is_killed_and_the_worker_goes_on(cluster: Cluster) -> None:
    release = Release(cluster, "trial")
    release.install(BASE)
    # It was up before the worker's first line, which reached it by the CA of the shared volume.
    (first,) = release.log("kestra-worker").splitlines()
    assert first.startswith("start: keybrake: 401 vault_key_invalid")
    pod = release.pod()
    states = {**statuses(pod, "initContainerStatuses"), **statuses(pod, "containerStatuses")}
    assert all(state["ready"] for state in states.values())
    started = {name: state["state"]["running"]["startedAt"] for name, state in states.items()}
    assert started["stripe"] <= started["keybrake"] <= started["kestra-worker"]

    task = release.forwarded()
    vault_key = task.mint(ADMIN_KEY)
    charge, replayed = task.charge(vault_key)
    assert not replayed

    since = time.monotonic()
    cluster.kill(states["keybrake"]["containerID"])
    wait_until("the sidecar is back", lambda: restarts(release, "keybrake") == 1, POD_TIMEOUT_S)
    seconds("trial: ready after SIGKILL", since)
    assert restarts(release, "kestra-worker") == restarts(release, "stripe") == 0
    assert release.pod()["metadata"]["uid"] == pod["metadata"]["uid"]
    # The ledger is on the pod's volume: the same key, the same charge, and Stripe has executed one.
    task = release.forwarded()
    assert task.charge(vault_key) == (charge, True)
    assert [(row["customer"], row["amount"]) for row in task.executed()] == [("cus_9", 2999)]
    assert release.keybrake("audit", "verify")["whole"] is True


@pytest.fixture(scope="module")
def lasting(cluster: Cluster) -> Release:
    release = Release(cluster, "lasting")
    cluster.apply(volume(cluster.workdir / "volume"))
    release.install(BASE, PERSISTENT)
    return release


def test_a_rollout_drains_the_worker_first_and_keeps_the_ledger(lasting: Release) -> None:
    release, first = lasting, lasting.pod()

    # As the README has it: the running sidecar makes the issuer key, the next worker has it from its environment.
    bounds = ["--name", "billing", "--label-prefix", "kestra-", "--allow", "POST /v1/charges", "--max-cap-usd", "50"]
    more = ["--daily-usd-cap", "5000", "--max-expires-in", "3600", "--expires-in", "7776000"]
    issuer_key = release.keybrake("issuers", "create", *bounds, *more)["issuer_key"]
    task = release.forwarded()
    charge, replayed = task.charge(task.mint(issuer_key))
    assert not replayed
    encoded = base64.b64encode(issuer_key.encode()).decode()
    release.kubectl("create", "secret", "generic", "keybrake-issuer", f"--from-literal=issuer-key-base64={encoded}")
    worker, sidecar = release.follow("kestra-worker"), release.follow("keybrake")
    wait_until("logs are followed", lambda: worker.tail() and sidecar.tail())
    since = time.monotonic()
    release.kubectl("rollout", "restart", WORKER)
    release.ready()
    seconds("lasting: a rollout, of which the worker drains 4 s", since)

    # The sidecar answered until the worker was done, and was told to stop after that.
    wait_until("the logs of the first pod end", lambda: worker.exit_code() == sidecar.exit_code() == 0, POD_TIMEOUT_S)
    drained = lines(worker)
    told = [text for _, text in drained]
    assert told[0].startswith("start: keybrake: 401 vault_key_invalid")
    # It was installed before there was an issuer key: the sidecar answers, and says so.
    assert told[1:] == [told[0].replace("start:", "draining:")] * DRAINS + ["drained"]
    (stopped,) = [at for at, text in lines(sidecar) if "keybrake has stopped" in text]
    assert stopped > drained[-1][0]

    # The next pod has the ledger and the issuer key; its stand-in for Stripe is a new one and has nothing to do.
    assert release.pod()["metadata"]["uid"] != first["metadata"]["uid"]
    assert release.log("kestra-worker").splitlines() == ["start: answered"]
    task = release.forwarded()
    assert task.charge(task.mint(issuer_key)) == (charge, True)
    assert task.executed() == []
    assert release.keybrake("audit", "verify")["whole"] is True


def test_the_pod_after_a_deleted_one_waits_for_the_ledger(lasting: Release) -> None:
    release, first = lasting, lasting.pod()
    task = release.forwarded()
    charge, _ = task.charge(task.mint(ADMIN_KEY))
    worker, sidecar = release.follow("kestra-worker"), release.follow("keybrake")
    wait_until("logs are followed", lambda: worker.tail() and sidecar.tail())
    since = time.monotonic()
    release.kubectl("delete", "pod", first["metadata"]["name"], "--wait=false")
    # Unlike a rollout: there are two pods now, and one ledger.
    wait_until("there is a next pod", release.pods)
    release.ready()
    seconds("lasting: a deleted pod replaced", since)
    wait_until("the logs of the first pod end", lambda: worker.exit_code() == sidecar.exit_code() == 0, POD_TIMEOUT_S)
    (stopped,) = [at for at, text in lines(sidecar) if "keybrake has stopped" in text]
    assert lines(worker)[-1][1] == "drained" and lines(worker)[-1][0] < stopped
    state = statuses(release.pod(), "initContainerStatuses")["keybrake"]
    # To the second, as Kubernetes tells it; and it was not started in vain before.
    assert state["state"]["running"]["startedAt"][:19] >= stopped[:19]
    assert state["restartCount"] == 0
    task = release.forwarded()
    assert task.charge(task.mint(ADMIN_KEY)) == (charge, True)


@pytest.fixture(scope="module")
def ledger(cluster: Cluster) -> Iterator[Database]:
    with database() as made:
        yield made


@pytest.fixture(scope="module")
def fleet(cluster: Cluster, ledger: Database) -> Release:
    release = Release(cluster, "fleet", "statefulset/kestra-worker")
    release.install(BASE, POSTGRES, ledger=ledger)
    return release


def test_what_one_pod_charged_the_others_know(fleet: Release) -> None:
    release = fleet
    names = sorted(pod["metadata"]["name"] for pod in release.pods())
    assert names == [f"kestra-worker-{number}" for number in range(3)]
    for name in names:
        assert release.log("kestra-worker", name).startswith("start: keybrake: 401 vault_key_invalid")
    one, other = release.forwarded(names[0]), release.forwarded(names[1])
    vault_key = one.mint(ADMIN_KEY)
    charge, replayed = one.charge(vault_key)
    assert not replayed
    assert other.charge(vault_key) == (charge, True)
    # The cap has no room for a second one, wherever it is asked for.
    assert other.refused(vault_key, "2026-08") == (429, "spend_cap_exceeded")
    assert (len(one.executed()), other.executed()) == (1, [])

    since = time.monotonic()
    release.cluster.kill(statuses(release.named(names[0]), "initContainerStatuses")["keybrake"]["containerID"])
    assert other.charge(vault_key) == (charge, True)
    wait_until("the sidecar is back", lambda: restarts(release, "keybrake", names[0]) == 1, POD_TIMEOUT_S)
    seconds("fleet: ready after SIGKILL", since)
    assert restarts(release, "kestra-worker", names[0]) == 0
    one = release.forwarded(names[0])
    assert one.charge(vault_key) == (charge, True)
    assert [(row["customer"], row["amount"]) for row in one.executed()] == [("cus_9", 2999)]

    since = time.monotonic()
    release.kubectl("rollout", "restart", release.worker)
    release.ready()
    seconds("fleet: a rollout of three pods, of which each drains 4 s", since)
    # Pods of the same names go on with what those before them knew and wrote.
    one = release.forwarded(names[0])
    assert (one.charge(vault_key), one.executed()) == ((charge, True), [])
    assert {"forwarded", "replayed"} <= {
        row["decision"] for row in release.keybrake("audit", "query", "customer=cus_9", pod=names[0])["data"]
    }
    for name in names:
        assert release.keybrake("audit", "verify", pod=name)["whole"] is True


def test_pods_wait_for_their_database(fleet: Release, ledger: Database) -> None:
    release = fleet
    names = sorted(pod["metadata"]["name"] for pod in release.pods())
    task = release.forwarded(names[1])
    vault_key = task.mint(ADMIN_KEY)
    charge, _ = task.charge(vault_key)
    before = [restarts(release, "keybrake", name) for name in names]
    last = statuses(release.named(names[2]), "initContainerStatuses")["keybrake"]["containerID"]
    ledger.crash()
    assert task.refused(vault_key) == (503, "ledger_unavailable")
    since = time.monotonic()

    def ready() -> list[str]:
        return [name for name in names if restarts(release, "keybrake", name) is not None]

    wait_until("no pod is ready", lambda: not ready(), POD_TIMEOUT_S)
    seconds("fleet: all pods unready after the database went", since)
    # Nothing was restarted. What has to start now ends, until it finds the database.
    assert [count(release, name) for name in names] == before
    release.cluster.kill(last)
    wait_until("it was started in vain", lambda: count(release, names[2]) > before[2] + 1, POD_TIMEOUT_S)
    ledger.start()
    since = time.monotonic()
    release.ready()
    seconds("fleet: all pods ready after it came back", since)
    assert [restarts(release, "keybrake", name) for name in names[:2]] == before[:2]
    assert task.charge(vault_key) == (charge, True)
    assert release.forwarded(names[2]).charge(vault_key) == (charge, True)


def count(release: Release, name: str) -> int:
    """How often the sidecar of a pod was started again, ready or not."""
    return statuses(release.named(name), "initContainerStatuses")["keybrake"]["restartCount"]


def statuses(pod: Manifest, name: str) -> dict[str, Manifest]:
    return {status["name"]: status for status in pod["status"][name]}


def restarts(release: Release, container: str, name: str = "") -> int | None:
    """How often it was started again, in the one pod or that of a name; None while it is not ready."""
    pod = release.named(name) if name else release.pod()
    status = {**statuses(pod, "initContainerStatuses"), **statuses(pod, "containerStatuses")}[container]
    return status["restartCount"] if status["ready"] else None


def lines(log: Child) -> list[tuple[str, str]]:
    """Time and text of what a followed log holds."""
    return [(at, text) for at, _, text in (line.partition(" ") for line in log.log.read_text().splitlines())]


def volume(path: Path) -> Manifest:
    """A directory of this machine, as root makes it."""
    path.mkdir()
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": ["localhost"]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": "ledger"},
        "spec": {
            "accessModes": ["ReadWriteOncePod"],
            "capacity": {"storage": "10Gi"},
            "local": {"path": str(path)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
        },
    }
