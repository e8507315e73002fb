"""The overlay for Kestra's official chart, rendered by Helm's own engine and checked against Kubernetes' schemas.

The chart is not part of this repository: KESTRA_CHARTS names unpacked ones. What needs none runs without.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from chart import BASE, HELM, KUBERNETES_OF_A_FLEET, PERSISTENT, POSTGRES, RELEASE, REPO, Manifest, Rendered
from chart import charts, check, merge, one, plain, render, values

OVERLAYS = [(BASE,), (BASE, PERSISTENT)]
WORKER = f"{RELEASE}-worker"
OTHERS = {f"{RELEASE}-{name}" for name in ("webserver", "executor", "scheduler", "indexer")}
MANIFESTS = ("secrets.example.yaml", "network-policy.yaml", "ledger-claim.yaml")


NO_CHART: list[Path | None] = [None]


@pytest.fixture(params=[*charts()] or NO_CHART, ids=lambda path: str(path) if path else "no chart")
def chart(request: pytest.FixtureRequest) -> Path:
    path: Path | None = request.param
    if path is None:
        pytest.fail(
            "no chart: pull it from the chart repository of Kestra (helm pull, --untar), "
            "then make test-helm CHARTS=kestra"
        )
    return path


@pytest.fixture(params=OVERLAYS, ids=["base", "persistent"])
def given(request: pytest.FixtureRequest) -> Manifest:
    return values(*request.param)


@pytest.fixture
def rendered(chart: Path, given: Manifest) -> Rendered:
    return render(chart, given)


def sidecar_of(pod: Manifest) -> Manifest:
    return one(pod["initContainers"], "keybrake")


def worker_of(rendered: Rendered) -> tuple[Manifest, Manifest]:
    """The worker's pod and its main container."""
    pod = rendered.workloads()[WORKER]
    (main,) = pod["containers"]
    return pod, main


def test_the_sidecar_knows_every_setting() -> None:
    # Those that are commented out too: it refuses to start with a name that it does not know.
    named = re.findall(r"name: (KEYBRAKE_[A-Z_]+)", (HELM / BASE).read_text() + (HELM / POSTGRES).read_text())
    assert {"KEYBRAKE_STRIPE_SECRET_KEY_FILE", "KEYBRAKE_CA_OUT", "KEYBRAKE_COLLECTOR_URL"} <= set(named)
    assert {"KEYBRAKE_LEDGER_URL_FILE", "KEYBRAKE_LEDGER_CA_FILE"} <= set(named)
    source = (REPO / "src" / "config.rs").read_text()
    known = set(re.findall(r'setting\(\s*"(KEYBRAKE_[A-Z_]+)"', source))
    secrets = set(re.findall(r'secret\(\s*"(KEYBRAKE_[A-Z_]+)"', source))
    assert set(named) <= known | secrets | {f"{name}_FILE" for name in secrets}


def test_kubernetes_knows_every_field(rendered: Rendered) -> None:
    rendered.check()
    assert {manifest["kind"] for manifest in rendered.manifests} >= {"Deployment", "ConfigMap", "Service"}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("restartPolicy: Always", "restartPolice: Always"),
        ("readOnlyRootFilesystem: true", "readOnlyRootFileSystem: true"),
        ("failureThreshold: 60", "failureTreshold: 60"),
        ("mountPath: /etc/keybrake", "mountpath: /etc/keybrake"),
        ("defaultMode: 0444", "mode: 0444"),
        ("optional: true", "optional: sometimes"),
    ],
)
def test_a_misspelt_field_is_refused(chart: Path, right: str, wrong: str) -> None:
    text = (HELM / BASE).read_text()
    assert text.count(right) == 1
    given = values()
    merge(given, yaml.safe_load(text.replace(right, wrong)))
    with pytest.raises(kubernetes_validate.ValidationError):
        render(chart, given).check()


def test_only_the_worker_has_a_sidecar(rendered: Rendered) -> None:
    workloads = rendered.workloads()
    assert workloads.keys() == {WORKER} | OTHERS
    for name in OTHERS:
        assert "initContainers" not in workloads[name]
        assert "keybrake-" not in str(workloads[name])
    pod, main = worker_of(rendered)
    assert [container["name"] for container in pod["initContainers"]] == ["keybrake"]
    assert main["name"] == "kestra-worker"


def test_the_sidecar_starts_first_and_ends_last(rendered: Rendered) -> None:
    pod, _ = worker_of(rendered)
    sidecar = sidecar_of(pod)
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["args"] == ["serve"]
    # A kubelet cannot come to the pod's loopback.
    probes = {name: sidecar[name] for name in sidecar if name.endswith("Probe")}
    assert probes.keys() == {"startupProbe", "readinessProbe"}
    for probe in probes.values():
        assert probe["exec"]["command"] == ["/keybrake", "health"]
        assert not probe.keys() & {"httpGet", "tcpSocket", "grpc"}
        # `keybrake health` gives up by itself after two seconds.
        assert probe["timeoutSeconds"] > 2


def test_the_sidecar_may_do_nothing_that_it_need_not(rendered: Rendered) -> None:
    pod, _ = worker_of(rendered)
    assert sidecar_of(pod)["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert not any(pod.get(name) for name in ("hostNetwork", "hostPID", "shareProcessNamespace"))


def test_the_stripe_key_is_in_the_sidecar_alone(rendered: Rendered) -> None:
    pod, main = worker_of(rendered)
    secret = one(pod["volumes"], "keybrake-secrets")["secret"]
    # Its files are root's: the others may read, and so may user 65532.
    assert (secret["secretName"], secret["defaultMode"] & 0o004) == ("keybrake", 0o004)
    mount = one(sidecar_of(pod)["volumeMounts"], "keybrake-secrets")
    assert mount["readOnly"] is True
    for volume in ("keybrake-secrets", "keybrake-data"):
        assert volume not in [mount["name"] for mount in main["volumeMounts"]]
    # Nor by way of the environment, which a task of the Process runner inherits.
    assert "envFrom" not in main
    named = [entry["valueFrom"]["secretKeyRef"]["name"] for entry in main["env"] if "valueFrom" in entry]
    assert named == ["keybrake-issuer"]
    # What the sidecar reads is in the Secret of the example.
    files = {entry["value"] for entry in sidecar_of(pod)["env"] if entry["name"].endswith("_FILE")}
    keys = {f"{mount['mountPath']}/{key}" for key in one_manifest("Secret", "keybrake")["stringData"]}
    assert files == keys


def test_the_worker_reads_the_ca_and_cannot_write_it(rendered: Rendered) -> None:
    pod, main = worker_of(rendered)
    theirs = one(main["volumeMounts"], "keybrake-ca")
    ours = one(sidecar_of(pod)["volumeMounts"], "keybrake-ca")
    assert (theirs["readOnly"], ours.get("readOnly", False)) == (True, False)
    written = one(sidecar_of(pod)["env"], "KEYBRAKE_CA_OUT")["value"]
    read = one(main["env"], "ENV_KEYBRAKE_CA")["value"]
    assert written.removeprefix(ours["mountPath"]) == read.removeprefix(theirs["mountPath"]) == "/ca.pem"
    assert one(main["env"], "ENV_KEYBRAKE_URL")["value"] == "https://localhost:8443"
    assert one(pod["volumes"], "keybrake-ca")["emptyDir"] == {}


def test_there_is_one_worker_with_one_ledger(chart: Path, given: Manifest) -> None:
    # Also when the other deployments are scaled and rolled.
    given["common"] = {"replicas": 3, "strategy": {"type": "RollingUpdate"}, "autoscaler": {"enabled": True}}
    rendered = render(chart, given)
    spec = rendered.named("Deployment", WORKER)["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    scalers = [manifest for manifest in rendered.manifests if manifest["kind"] == "HorizontalPodAutoscaler"]
    assert {scaler["spec"]["scaleTargetRef"]["name"] for scaler in scalers} == OTHERS


def test_lists_under_common_are_kept(chart: Path, given: Manifest) -> None:
    given["common"] = {
        "initContainers": [{"name": "mine", "image": "mine:1"}],
        "extraVolumes": [{"name": "mine", "emptyDir": {}}],
        "extraEnv": [{"name": "MINE", "value": "1"}],
    }
    pod, main = worker_of(render(chart, given))
    assert [container["name"] for container in pod["initContainers"]] == ["mine", "keybrake"]
    assert one(pod["volumes"], "mine") and one(pod["volumes"], "keybrake-ca")
    assert one(main["env"], "MINE") and one(main["env"], "ENV_KEYBRAKE_URL")


def test_scripts_run_where_localhost_is_the_sidecars(rendered: Rendered) -> None:
    text = rendered.named("ConfigMap", f"{RELEASE}-config")["data"]["_default.yml"]
    configuration = yaml.safe_load(text)["kestra"]
    # A user's own settings are still there.
    assert configuration["queue"] == {"type": "postgres"}
    for default in configuration["plugins"]["defaults"]:
        assert default["values"] == {"taskRunner": {"type": "io.kestra.plugin.core.runner.Process"}}
        # Kestra applies a default to every type that begins so; a runner has no runner.
        assert not "io.kestra.plugin.scripts.runner.docker.Docker".startswith(default["type"])


def test_a_standalone_server_takes_the_same_block(chart: Path, given: Manifest) -> None:
    deployments = given["deployments"]
    moved = {name: {"enabled": False} for name in deployments} | {"standalone": deployments["worker"]}
    given["deployments"] = moved
    rendered = render(chart, given)
    rendered.check()
    assert rendered.workloads().keys() == {f"{RELEASE}-standalone"}
    (pod,) = rendered.workloads().values()
    assert sidecar_of(pod)["restartPolicy"] == "Always"


def test_the_persistent_variant_changes_the_ledgers_volume_alone() -> None:
    base, persistent = values(BASE), values(BASE, PERSISTENT)
    volumes = persistent["deployments"]["worker"]["extraVolumes"]
    claim = one(volumes, "keybrake-data")["persistentVolumeClaim"]["claimName"]
    assert claim == one_manifest("PersistentVolumeClaim", "keybrake-ledger")["metadata"]["name"]
    volumes[0] = one(base["deployments"]["worker"]["extraVolumes"], "keybrake-data")
    # Of the sidecar's group, or it could not write a new volume.
    sidecar = base["deployments"]["worker"]["initContainers"][0]
    security = persistent["deployments"]["worker"].pop("podSecurityContext")
    assert security["fsGroup"] == sidecar["securityContext"]["runAsGroup"]
    assert persistent == base


def test_the_variant_of_a_fleet_changes_the_ledger_and_the_pods_names_alone() -> None:
    base, fleet = (values(*files)["deployments"]["worker"] for files in ((BASE,), (BASE, POSTGRES)))
    assert (fleet.pop("kind"), fleet.pop("replicas"), base.pop("replicas")) == ("StatefulSet", 3, 1)
    before, after = (worker["initContainers"][0].pop("env") for worker in (base, fleet))
    node = one(after, "KEYBRAKE_NODE")
    assert node["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    # It finds keys, caps and calls in the database, and not in the volume beside it.
    ledger = [entry for entry in after if entry["name"].startswith("KEYBRAKE_LEDGER_")]
    assert {entry["name"] for entry in ledger} == {
        "KEYBRAKE_LEDGER_URL_FILE",
        "KEYBRAKE_LEDGER_PASSWORD_FILE",
        "KEYBRAKE_LEDGER_SCHEMA",
    }
    assert [entry for entry in after if entry not in [node, *ledger]] == [
        entry for entry in before if entry["name"] != "KEYBRAKE_NODE"
    ]
    secret, both = (worker["extraVolumes"].pop() for worker in (base, fleet))
    assert secret["name"] == both["name"]
    names = [source["secret"]["name"] for source in both["projected"]["sources"]]
    assert names == [secret["secret"]["secretName"], "keybrake-ledger"]
    assert both["projected"]["defaultMode"] == secret["secret"]["defaultMode"]
    # What the sidecar reads is in the Secrets of the example.
    keys = {key for name in names for key in one_manifest("Secret", name)["stringData"]}
    files = {entry["value"] for entry in after if entry["name"].endswith("_FILE")}
    assert files == {f"/run/secrets/keybrake/{key}" for key in keys}
    # Probes, what it may do, mounts, the worker's environment.
    assert fleet == base


def test_each_pod_of_a_fleet_has_a_name_that_stays(chart: Path) -> None:
    rendered = render(chart, values(BASE, POSTGRES))
    rendered.check(KUBERNETES_OF_A_FLEET)
    spec = rendered.named("StatefulSet", WORKER)["spec"]
    assert spec["replicas"] == 3
    pod, main = worker_of(rendered)
    assert one(sidecar_of(pod)["env"], "KEYBRAKE_NODE")["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert "keybrake-secrets" not in [mount["name"] for mount in main["volumeMounts"]]
    assert "LEDGER" not in str(main["env"])
    # Two pods of a set are never there under one name; a volume that they shared would keep the second one out.
    assert not [volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_knows_every_field_of_a_plain_manifest(name: str) -> None:
    manifests = plain(name)
    check(manifests)
    manifests[0]["metadata"]["lables"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check(manifests)


def test_an_example_that_was_not_filled_in_is_no_key() -> None:
    given = one_manifest("Secret", "keybrake")["stringData"]
    # As `keybrake serve` judges them: what a Stripe key consists of, and how long an admin key is.
    assert not re.fullmatch(r"[rs]k_(test|live)_[A-Za-z0-9_]+", given["stripe-secret-key"])
    assert len(given["admin-key"]) < 32
    assert not re.match(r"postgres(ql)?://", one_manifest("Secret", "keybrake-ledger")["stringData"]["ledger-url"])
    issuer = one_manifest("Secret", "keybrake-issuer")["stringData"]
    with pytest.raises(ValueError):
        base64.b64decode(issuer["issuer-key-base64"], validate=True)


def test_the_policy_lets_nobody_in_and_the_worker_out(rendered: Rendered) -> None:
    policy = one_manifest("NetworkPolicy", "keybrake-worker")["spec"]
    labels = rendered.named("Deployment", WORKER)["spec"]["template"]["metadata"]["labels"]
    selected = policy["podSelector"]["matchLabels"]
    assert selected.items() <= labels.items()
    for name in OTHERS:
        others = rendered.named("Deployment", name)["spec"]["template"]["metadata"]["labels"]
        assert not selected.items() <= others.items()
    assert policy["ingress"] == []
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    ports = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
    assert {53, 443, 8444} <= ports


def one_manifest(kind: str, name: str) -> Manifest:
    manifests = [manifest for file in MANIFESTS for manifest in plain(file)]
    return Rendered(manifests).named(kind, name)
