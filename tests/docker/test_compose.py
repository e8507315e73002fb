"""The compose files, over what Kestra publishes, with stand-ins for Kestra and Stripe."""

from __future__ import annotations

import json
import re
import secrets
import socket
from pathlib import Path
from typing import Any

import pytest
from conftest import HERE, TASK_COMMAND, Project, Stage, billing
from engine import CommandError, Compose
from rig.process import REPO, wait_until

OFFICIAL = HERE / "kestra.compose.yaml"
KESTRA = REPO / "docker" / "compose.kestra.yaml"
PROCESS = REPO / "docker" / "compose.process.yaml"
ALIAS = REPO / "docker" / "compose.alias.yaml"
FLEET = REPO / "docker" / "compose.fleet.yaml"
POSTGRES = REPO / "docker" / "compose.postgres.yaml"
# One that a user adds.
THIRD = HERE / "third.fleet.yaml"
STANDIN = HERE / "standin.compose.yaml"
SHARED = "container:{container}"
# Exits 0 when somebody listens there, whatever the name or the address is.
REACH = "import socket,sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"


def project(stage: Stage, compose: Compose, *files: Path) -> Project:
    return Project(stage, compose, list(files), stage.settings())


def fleet(stage: Stage, compose: Compose, postgres_image: str, *files: Path) -> Project:
    """With a real database."""
    ours = project(stage, compose, *files, HERE / "standin.fleet.yaml")
    ours.settings["POSTGRES_IMAGE"] = postgres_image
    return ours


def read(stage: Stage, compose: Compose, *files: Path) -> dict[str, Any]:
    """What compose makes of the files of users, with no setting of ours."""
    told = compose.run(list(files), "config", "--format", "json", project=stage.name, settings={})
    return json.loads(told)["services"]


@pytest.mark.parametrize("extra", [[], [PROCESS], [ALIAS]], ids=["kestra", "process", "alias"])
def test_an_overlay_adds_to_what_kestra_publishes(stage: Stage, compose: Compose, extra: list[Path]) -> None:
    before = read(stage, compose, OFFICIAL)["kestra"]
    services = read(stage, compose, OFFICIAL, KESTRA, *extra)
    kestra, sidecar = services["kestra"], services["keybrake"]
    assert kestra["environment"].items() >= before["environment"].items()
    assert kestra["depends_on"]["keybrake"]["condition"] == "service_healthy"
    assert kestra["depends_on"].items() >= before["depends_on"].items()
    assert [volume for volume in before["volumes"] if volume not in kestra["volumes"]] == []

    plugins = json.loads(kestra["environment"]["MICRONAUT_APPLICATION_JSON"])["kestra"]["plugins"]
    assert plugins["configurations"][0]["values"] == {"volume-enabled": True}
    assert (sidecar["container_name"], kestra["environment"]["ENV_KEYBRAKE_CONTAINER"]) == ("keybrake-1", "keybrake-1")
    assert not [name for name in kestra["environment"] if "STRIPE" in name or "ADMIN" in name]
    assert "secrets" not in kestra
    assert sidecar["read_only"] and sidecar["cap_drop"] == ["ALL"]


def test_the_runner_of_docker_charges_once(stage: Stage, compose: Compose, customer: str) -> None:
    ours = project(stage, compose, OFFICIAL, KESTRA, STANDIN)
    sidecar = ours.settings["KEYBRAKE_CONTAINER"]
    ours.up()
    ours.give_issuer_key(sidecar)
    charged = ours.task(customer, SHARED)
    assert re.fullmatch(rf"{customer} ch_\w+", charged)
    assert ours.task(customer, SHARED) == charged
    assert len(stage.standin.executed(customer)) == 1
    assert [row["decision"] for row in stage.audit(sidecar, f"customer={customer}")] == ["replayed", "forwarded"]
    # A task is where the sidecar is, and not where Kestra and its database are.
    find = ["python3", "-c", "import socket; print(socket.gethostbyname('postgres'))"]
    ours.run("exec", "-T", "kestra", *find)
    with pytest.raises(CommandError, match="gaierror"):
        ours.task(customer, SHARED, command=find)
    # Kestra does not have the key that it charges with.
    environment = json.dumps(stage.engine.inspect(f"{stage.name}-kestra-1")["Config"]["Env"])
    assert stage.standin.secret_key not in environment and stage.admin_key not in environment

    ours.run("stop")
    state = {name: stage.engine.inspect(name)["State"] for name in (f"{stage.name}-kestra-1", sidecar)}
    assert state[sidecar]["ExitCode"] == 0
    assert state[f"{stage.name}-kestra-1"]["FinishedAt"] < state[sidecar]["FinishedAt"]


def test_the_runner_of_processes_finds_it_on_localhost(stage: Stage, compose: Compose, customer: str) -> None:
    ours = project(stage, compose, OFFICIAL, KESTRA, PROCESS, STANDIN)
    ours.up()
    ours.give_issuer_key(ours.settings["KEYBRAKE_CONTAINER"])
    charged = run_on_worker(ours, customer)
    # One sidecar for both runners.
    assert ours.task(customer, SHARED) == charged
    assert len(stage.standin.executed(customer)) == 1


def run_on_worker(ours: Project, customer: str) -> str:
    """A script as a child of the worker, with the worker's environment and what the flow takes from it."""
    given = (
        "import base64, json, os, subprocess, sys\n"
        "e = dict(os.environ, KEYBRAKE_URL=os.environ['ENV_KEYBRAKE_URL'], KEYBRAKE_CA=os.environ['ENV_KEYBRAKE_CA'],\n"
        "    KEYBRAKE_ISSUER_KEY=base64.b64decode(os.environ['SECRET_KEYBRAKE_ISSUER_KEY']).decode(),\n"
        "    **json.loads(sys.argv[1]))\n"
        "sys.exit(subprocess.run(json.loads(sys.argv[2]), env=e).returncode)\n"
    )
    task = [json.dumps(billing(customer)), json.dumps(TASK_COMMAND)]
    return ours.run("exec", "-T", "kestra", "python3", "-c", given, *task).strip()


def test_on_a_network_of_their_own_tasks_reach_the_sidecar_and_nothing_else(
    stage: Stage, compose: Compose, customer: str
) -> None:
    ours = project(stage, compose, OFFICIAL, KESTRA, ALIAS, STANDIN)
    network = ours.settings["KEYBRAKE_NETWORK"]
    sidecar = ours.settings["KEYBRAKE_CONTAINER"]
    ours.up()
    ours.give_issuer_key(sidecar)
    charged = ours.task(customer, network)
    assert ours.task(customer, network) == charged
    # The runner of processes is on the other network, and the sidecar on both.
    assert run_on_worker(ours, customer) == charged
    assert len(stage.standin.executed(customer)) == 1

    addresses = {name: net["IPAddress"] for name, net in networks(stage, sidecar).items()}
    outside = networks(stage, f"{stage.name}-kestra-1")[f"{stage.name}_default"]
    listen = "import http.server as h; h.HTTPServer(('', 8080), h.SimpleHTTPRequestHandler).serve_forever()"
    ours.run("exec", "-T", "--detach", "kestra", "python3", "-c", listen)

    def reach(where: str, port: str, by: str) -> None:
        ours.run("exec", "-T", by, "python3", "-c", REACH, where, port)

    def from_task(where: str, port: str) -> None:
        ours.task(customer, network, command=["python3", "-c", REACH, where, port])

    def listening() -> bool:
        try:
            reach(outside["IPAddress"], "8080", "postgres")
        except CommandError:
            return False
        return True

    wait_until("somebody listens outside", listening)
    from_task("keybrake", "8443")
    told = json.loads(stage.engine.docker("network", "inspect", network))[0]
    machine = told["IPAM"]["Config"][0]["Gateway"]
    # Else a task would reach what listens on all addresses of the machine.
    with pytest.raises(OSError, match="assign"), socket.create_server((machine, 0)):
        pass
    for where, port in (
        (machine, "8080"),
        (outside["IPAddress"], "8080"),
        # The sidecar's own other doors: its probes, and Stripe behind it.
        (addresses[network], "9464"),
        (addresses[network], "12111"),
    ):
        with pytest.raises(CommandError, match="unreachable|refused|timed out"):
            from_task(where, port)


def networks(stage: Stage, container: str) -> dict[str, dict[str, Any]]:
    return stage.engine.inspect(container)["NetworkSettings"]["Networks"]


def test_a_fleet_ships_to_its_collector(stage: Stage, compose: Compose, postgres_image: str, customer: str) -> None:
    services = read(stage, compose, FLEET)
    assert {"kestra", "postgres", "worker-1", "worker-2", "keybrake-1", "keybrake-2", "collector"} == set(services)
    ours = fleet(stage, compose, postgres_image, FLEET)
    ours.up()
    for number in ("1", "2"):
        sidecar = f"{ours.settings['KEYBRAKE_CONTAINER']}-{number}"
        ours.give_issuer_key(sidecar, f"SECRET_KEYBRAKE_ISSUER_KEY_{number}")
        own = f"{customer}{number}"
        charged = ours.task(own, SHARED, worker=f"worker-{number}")
        assert ours.task(own, SHARED, worker=f"worker-{number}") == charged
        assert len(stage.standin.executed(own)) == 1

    def shipped() -> dict[str, Any] | None:
        nodes = {node["node"]: node for node in ask_collector(ours, "/audit/nodes")}
        caught_up = all(node["backlog"] == 0 for node in nodes.values())
        return nodes if set(nodes) == {"worker-1", "worker-2"} and caught_up else None

    nodes = wait_until("both sidecars have shipped all", shipped)
    assert all(len(node["chains"]) == 1 for node in nodes.values())
    asked = ["exec", "-T", "collector", "/keybrake", "audit", "query", "outcome=spent", "--json"]
    spent = {(row["node"], row["customer"]) for row in json.loads(ours.run(*asked))["data"]}
    assert spent == {("worker-1", f"{customer}1"), ("worker-2", f"{customer}2")}


def test_a_fleet_has_one_ledger_in_kestras_database(stage: Stage, compose: Compose) -> None:
    before, after = read(stage, compose, FLEET), read(stage, compose, FLEET, POSTGRES)
    assert set(after) == set(before) | {"ledger-database"}
    ledger = {
        "KEYBRAKE_LEDGER_URL": "postgres://keybrake@/keybrake?host=/run/postgresql",
        "KEYBRAKE_LEDGER_PASSWORD_FILE": "/run/secrets/keybrake_ledger_password",
        "KEYBRAKE_LEDGER_SCHEMA": "keybrake",
    }
    known = (REPO / "src" / "config.rs").read_text()
    assert all(f'"{name.removesuffix("_FILE")}"' in known for name in ledger)
    sidecars = ("keybrake-1", "keybrake-2")
    for name in sidecars:
        alone, together = before[name], after[name]
        assert together["environment"] == alone["environment"] | ledger
        assert together["depends_on"] == alone["depends_on"] | {
            "ledger-database": {"condition": "service_completed_successfully", "required": True}
        }
        more = {kind: [one for one in together[kind] if one not in alone[kind]] for kind in ("secrets", "volumes")}
        assert [secret["target"] for secret in more["secrets"]] == [ledger["KEYBRAKE_LEDGER_PASSWORD_FILE"]]
        assert [(volume["source"], volume["target"]) for volume in more["volumes"]] == [
            ("postgres-socket", "/run/postgresql")
        ]
        # Tasks are on the sidecar's network: the database is not.
        assert together["networks"] == alone["networks"]
        assert not together["networks"].keys() & after["postgres"]["networks"].keys()
    nodes = {after[name]["environment"]["KEYBRAKE_NODE"] for name in sidecars}
    assert len(nodes) == len(sidecars)

    # The workers have one issuer key, and nothing that opens the database.
    for name in ("worker-1", "worker-2"):
        assert after[name]["volumes"] == before[name]["volumes"]
        assert "secrets" not in after[name] and "LEDGER" not in json.dumps(after[name])
    given = {"SECRET_KEYBRAKE_ISSUER_KEY": "aWs="}
    told = compose.run([FLEET, POSTGRES], "config", "--format", "json", project=stage.name, settings=given)
    workers = [json.loads(told)["services"][name]["environment"] for name in ("worker-1", "worker-2")]
    assert [worker["SECRET_KEYBRAKE_ISSUER_KEY"] for worker in workers] == ["aWs=", "aWs="]

    # What makes the database comes by the socket, with the password of the server's own role.
    maker, server = after["ledger-database"], after["postgres"]
    assert (maker["image"], maker["network_mode"], maker["restart"]) == (server["image"], "none", "no")
    assert maker["environment"]["PGUSER"] == server["environment"]["POSTGRES_USER"]
    assert maker["environment"]["PGPASSWORD"] == server["environment"]["POSTGRES_PASSWORD"]
    for service in (maker, server):
        assert ("postgres-socket", maker["environment"]["PGHOST"]) in [
            (volume["source"], volume["target"]) for volume in service["volumes"]
        ]


def test_what_one_worker_charged_the_other_one_knows(
    stage: Stage, compose: Compose, postgres_image: str, customer: str
) -> None:
    ours = fleet(stage, compose, postgres_image, FLEET, POSTGRES)
    ours.up()
    ours.give_issuer_key(f"{ours.settings['KEYBRAKE_CONTAINER']}-1")
    charged = ours.task(customer, SHARED, worker="worker-1")
    assert ours.task(customer, SHARED, worker="worker-2") == charged
    assert len(stage.standin.executed(customer)) == 1

    # One key, for one charge of 29.99 and a second that is no larger than 20.01.
    key = asked(ours, "worker-1", "mint", "50.00")["body"]["vault_key"]
    other = f"{customer}other"
    first = asked(ours, "worker-2", "charge", key, other, "2999", f"{other}:1")
    assert (first["status"], first["replayed"]) == (200, False)
    again = asked(ours, "worker-1", "charge", key, other, "2999", f"{other}:1")
    assert (again["body"]["id"], again["replayed"]) == (first["body"]["id"], True)
    over = asked(ours, "worker-1", "charge", key, other, "2002", f"{other}:2")
    assert (over["status"], over["body"]["error"]["code"]) == (429, "spend_cap_exceeded")
    within = asked(ours, "worker-1", "charge", key, other, "2001", f"{other}:2")
    assert (within["status"], within["replayed"]) == (200, False)
    assert [row["amount"] for row in stage.standin.executed(other)] == [2999, 2001]

    # What each had to do with is in its own chain of records.
    def recorded() -> set[tuple[str, str]] | None:
        rows = ask_collector(ours, f"/audit?customer={other}")
        return {(row["node"], row["decision"]) for row in rows} if len(rows) == 4 else None

    records = wait_until("both sidecars have shipped all", recorded)
    assert records == {
        ("worker-2", "forwarded"),
        ("worker-1", "replayed"),
        ("worker-1", "refused"),
        ("worker-1", "forwarded"),
    }

    ours.run("stop")
    last = [f"{stage.name}-worker-1-1", f"{ours.settings['KEYBRAKE_CONTAINER']}-1", f"{stage.name}-postgres-1"]
    ended = [stage.engine.inspect(name)["State"] for name in last]
    assert [state["ExitCode"] for state in ended] == [0, 0, 0]
    # Calls end before the ledger does.
    assert ended == sorted(ended, key=lambda state: state["FinishedAt"])


def test_a_worker_that_is_added_knows_what_the_others_charged(
    stage: Stage, compose: Compose, postgres_image: str, customer: str
) -> None:
    ours = fleet(stage, compose, postgres_image, FLEET, POSTGRES)
    ours.up()
    sidecar = ours.settings["KEYBRAKE_CONTAINER"]
    ours.give_issuer_key(f"{sidecar}-1")
    charged = ours.task(customer, SHARED, worker="worker-1")
    before = stage.engine.inspect(f"{sidecar}-1")["State"]["StartedAt"]

    token = secrets.token_hex(32)
    stage.secret("token_3", token)
    # Added to the file that is there: another one of that name would not be the one that the container sees.
    known = stage.secrets / "tokens"
    known.chmod(0o644)
    with known.open("a") as file:
        file.write(f"worker-3 {token}\n")
    ours.run("kill", "--signal", "HUP", "collector")
    ours.files += [THIRD, HERE / "standin.third.yaml"]
    ours.up()
    assert ours.task(customer, SHARED, worker="worker-3") == charged
    assert len(stage.standin.executed(customer)) == 1
    # It charges as well, and nobody else was made anew for it.
    own = f"{customer}3"
    assert re.fullmatch(rf"{own} ch_\w+", ours.task(own, SHARED, worker="worker-3"))
    assert stage.engine.inspect(f"{sidecar}-1")["State"]["StartedAt"] == before
    nodes = {"worker-1", "worker-2", "worker-3"}
    wait_until("it ships", lambda: nodes == {node["node"] for node in ask_collector(ours, "/audit/nodes")})


def test_a_fleet_charges_nothing_while_its_database_is_gone(
    stage: Stage, compose: Compose, postgres_image: str, customer: str
) -> None:
    ours = fleet(stage, compose, postgres_image, FLEET, POSTGRES)
    sidecars = [f"{ours.settings['KEYBRAKE_CONTAINER']}-{number}" for number in (1, 2)]
    ours.up()
    ours.give_issuer_key(sidecars[0])
    key = asked(ours, "worker-1", "mint", "50.00")["body"]["vault_key"]
    first = asked(ours, "worker-1", "charge", key, customer, "2999", f"{customer}:1")
    assert first["status"] == 200

    # As the kernel does it when memory runs out.
    ours.run("kill", "postgres")
    for worker in ("worker-1", "worker-2"):
        # The one that was answered before, and another.
        for number in (1, 2):
            refused = asked(ours, worker, "charge", key, customer, "2999", f"{customer}:{number}")
            assert (refused["status"], refused["body"]["error"]["code"]) == (503, "ledger_unavailable")
    for sidecar in sidecars:
        with pytest.raises(CommandError, match="exit code 1"):
            stage.engine.docker("exec", sidecar, "/keybrake", "health")

    # One that is started meanwhile ends, and is started again until the database is there.
    stage.engine.docker("restart", sidecars[1])
    wait_until("it is started again", lambda: restarts(stage, sidecars[1]) > 0)
    ours.run("start", "postgres")

    def answered() -> dict[str, Any] | None:
        answer = asked(ours, "worker-1", "charge", key, customer, "2999", f"{customer}:1")
        return answer if answer["status"] != 503 else None

    again = wait_until("a charge is answered again", answered)
    assert (again["status"], again["body"]["id"], again["replayed"]) == (200, first["body"]["id"], True)
    # By itself.
    assert restarts(stage, sidecars[0]) == 0
    wait_until("the other one is healthy", lambda: stage.engine.health(sidecars[1]) == "healthy")
    again = asked(ours, "worker-2", "charge", key, customer, "2999", f"{customer}:1")
    assert (again["status"], again["body"]["id"], again["replayed"]) == (200, first["body"]["id"], True)
    assert len(stage.standin.executed(customer)) == 1


def restarts(stage: Stage, container: str) -> int:
    return stage.engine.inspect(container)["RestartCount"]


def test_the_database_of_a_fleet_opens_to_its_password_alone(
    stage: Stage, compose: Compose, postgres_image: str, customer: str
) -> None:
    ours = fleet(stage, compose, postgres_image, FLEET, POSTGRES)
    ours.up()
    look = ["python3", "-c", "import os; print(os.path.exists('/run/postgresql'))"]
    ours.give_issuer_key(f"{ours.settings['KEYBRAKE_CONTAINER']}-1")
    assert ours.task(customer, SHARED, worker="worker-1", command=look) == "False"
    find = ["python3", "-c", "import socket; print(socket.gethostbyname('postgres'))"]
    with pytest.raises(CommandError, match="gaierror"):
        ours.task(customer, SHARED, worker="worker-1", command=find)

    def rows(role: str, database: str, *environment: str) -> str:
        given = [part for one in environment for part in ("--env", one)]
        ask = ["psql", "--no-psqlrc", "--no-password", "--tuples-only", "--username", role, "--dbname", database]
        count = "SELECT count(*) > 0 FROM information_schema.tables WHERE table_schema = 'keybrake'"
        return ours.run("exec", "-T", *given, "postgres", *ask, "--command", count).strip()

    assert rows("keybrake", "keybrake", f"PGPASSWORD={stage.ledger_password}") == "t"
    # By the socket, as the sidecars come.
    with pytest.raises(CommandError, match="no password supplied"):
        rows("keybrake", "keybrake")
    with pytest.raises(CommandError, match="password authentication failed"):
        rows("keybrake", "keybrake", "PGPASSWORD=another")
    # It comes from the file: nobody else finds it by looking at containers.
    containers = [stage.engine.inspect(one) for one in ours.run("ps", "--all", "--quiet").split()]
    assert len(containers) >= 8
    for one in containers:
        assert stage.ledger_password not in json.dumps(one)
        # Nor does any leave a volume behind that nobody knows by name.
        nameless = [mount for mount in one["Mounts"] if re.fullmatch(r"[0-9a-f]{64}", mount.get("Name", ""))]
        assert not nameless, (one["Name"], nameless)


def asked(ours: Project, worker: str, *arguments: str) -> dict[str, Any]:
    """What a task of this worker is told."""
    ask = ["python3", "/test/client.py", *arguments]
    return json.loads(ours.task("nobody", SHARED, worker=worker, command=ask))


def ask_collector(ours: Project, path: str) -> list[dict[str, Any]]:
    """From within its container's network: only the sidecars know another way."""
    stage = ours.stage
    ask = (
        "import ssl, sys, urllib.request as r\n"
        "q = r.Request('https://localhost:8444' + sys.argv[1], headers={'Authorization': 'Bearer ' + sys.argv[2]})\n"
        "print(r.urlopen(q, timeout=10, context=ssl.create_default_context(cafile='/ca/ca.pem')).read().decode())\n"
    )
    network, ca = f"container:{stage.name}-collector-1", f"{stage.name}_keybrake-collector-ca:/ca:ro"
    run = ["run", "--rm", "--network", network, "--volume", ca, "--entrypoint", "python3", stage.task_image]
    return json.loads(stage.engine.docker(*run, "-c", ask, path, stage.query_key))["data"]
