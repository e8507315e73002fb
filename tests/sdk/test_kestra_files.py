"""The files that a Kestra namespace gets (kestra/files), each as a flow runs it: a fresh process beside its files."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import certifi
import pytest

import setup
from conftest import World
from rig.process import REPO, clean_environment

FILES = REPO / "kestra" / "files"
FLOWS = REPO / "kestra" / "flows" / "1.3"
TASK_TIMEOUT_S = 60
PRO_CENTS = json.loads((FILES / "prices.json").read_text())["pro"]

CHARGE = """
import json, os
import keybrake, stripe
line = json.load(open("line.json"))
prices = json.load(open("prices.json"))
key = keybrake.issue(
    f"kestra-billing-{line['line_id']}",
    cap_usd=keybrake.usd(prices[line["plan"]]),
    scope=f"billing:{os.environ['PERIOD']}",
    fields=["customer", "metadata[line_id]"],
    metadata={"period": os.environ["PERIOD"]},
)
assert key.secret not in repr(key)
try:
    charge = keybrake.client(key).v1.charges.create({
        "amount": line["cents"], "currency": "usd", "customer": line["customer"],
        "metadata": {"line_id": line["line_id"]},
    })
except stripe.StripeError as error:
    print(json.dumps({"code": keybrake.code(error)}))
else:
    print(json.dumps({"id": charge.id, "replayed": keybrake.replayed(charge)}))
"""


def run(world: World, directory: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**world.sidecar.flow_environment(), "PERIOD": "2026-07", **environment}
    return subprocess.run(
        command,
        cwd=directory,
        # A proxy that answers to nobody: whoever asked it would fail.
        env={**clean_environment(given), "HTTPS_PROXY": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=TASK_TIMEOUT_S,
    )


def script(world: World, directory: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(world, directory, [sys.executable, "-c", text], **environment)


def scripts_of(flow: str) -> list[str]:
    """The scripts in a flow, each of which is the last that its task says."""
    _, *rest = (FLOWS / f"{flow}.yaml").read_text().split("    script: |\n")
    return [textwrap.dedent(part.split("\n  - id:")[0]) for part in rest]


@pytest.fixture
def directory(tmp_path: Path, customer: str) -> Path:
    """A task's working directory: its namespace files, and the line that it is to charge."""
    for file in FILES.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    line = {"line_id": f"L-{customer}", "customer": customer, "plan": "pro", "cents": PRO_CENTS}
    (tmp_path / "line.json").write_text(json.dumps(line))
    return tmp_path


def told(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_task_that_runs_again_gets_the_answer_of_its_first_run(world: World, customer: str, directory: Path) -> None:
    context = f"flow=charge_retry execution=4XyFirst attempt=0 original-execution= run={'x' * 300}"
    first = told(script(world, directory, CHARGE, KEYBRAKE_CONTEXT=context))
    again = told(script(world, directory, CHARGE, KEYBRAKE_CONTEXT=context.replace("attempt=0", "attempt=1")))
    assert (first["replayed"], again["replayed"]) == (False, True)
    assert first["id"] == again["id"] and len(world.standin.executed(customer)) == 1
    rows = world.sidecar.audit(customer=customer, **{"metadata[execution]": "4XyFirst"})
    assert [row["metadata"]["attempt"] for row in rows] == ["0", "1"]
    assert "original_execution" not in rows[0]["metadata"]


def test_many_at_once_are_one_charge(world: World, customer: str, directory: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = [told(done) for done in pool.map(lambda _: script(world, directory, CHARGE), range(6))]
    assert len({answer["id"] for answer in answers}) == 1
    assert len(world.standin.executed(customer)) == 1


def test_an_amount_above_the_price_is_refused_by_name(world: World, customer: str, directory: Path) -> None:
    line = json.loads((directory / "line.json").read_text())
    (directory / "line.json").write_text(json.dumps({**line, "cents": PRO_CENTS * 100}))
    assert told(script(world, directory, CHARGE)) == {"code": "spend_cap_exceeded"}
    assert world.standin.executed(customer) == []


def test_what_was_charged_can_be_asked_for(world: World, customer: str, directory: Path) -> None:
    filters = {"customer": customer, "metadata[period]": "2026-07"}
    ask = f"import json, keybrake; print(json.dumps(keybrake.charged(**{filters})))"
    assert told(script(world, directory, ask)) == []
    charge = told(script(world, directory, CHARGE))
    rows = told(script(world, directory, ask))
    assert [(row["outcome"], row["object_id"]) for row in rows] == [("spent", charge["id"])]


def test_a_preflight_enters_what_the_run_before_could_not(world: World, customer: str, directory: Path) -> None:
    preflight, charge = scripts_of("charge_preflight")
    books = (directory / "bookkeeping.py").read_text()
    (directory / "bookkeeping.py").write_text('def record(*_): raise SystemExit("the database is down")\n')
    assert "database is down" in script(world, directory, charge).stderr
    (charged,) = world.standin.executed(customer)
    (directory / "bookkeeping.py").write_text(books)
    again = script(world, directory, preflight)
    assert again.stdout.splitlines() == [f"L-{customer} {charged['object_id']}", '::{"outputs": {"charged": true}}::']


def test_a_preflight_takes_no_doubt_for_a_yes(world: World, customer: str, directory: Path) -> None:
    preflight, charge = scripts_of("charge_preflight")
    world.standin.fault("reset", customer=customer)
    assert "may or may not have executed" in script(world, directory, charge).stderr
    assert world.standin.executed(customer) == []
    assert script(world, directory, preflight).stdout == '::{"outputs": {"charged": false}}::\n'
    # Asked again, the doubt ends.
    assert script(world, directory, charge).returncode == 0 and len(world.standin.executed(customer)) == 1


@pytest.mark.parametrize("name", ["", " ", None, 7, ["evt"]])
def test_an_event_without_an_id_charges_nobody(world: World, customer: str, directory: Path, name: object) -> None:
    (webhook,) = scripts_of("webhook_charge")
    event = {"id": name, "line_id": "L1", "customer": customer, "plan": "pro", "cents": PRO_CENTS}
    (directory / "event.json").write_text(json.dumps(event))
    done = script(world, directory, webhook)
    assert done.returncode == 1 and "the event has no id" in done.stderr
    assert world.standin.executed(customer) == []


def test_what_the_sidecar_does_not_allow_is_an_error_that_names_it(world: World, directory: Path) -> None:
    for call, words in [
        ('keybrake.issue("other-label", cap_usd="1.00")', "403"),
        ('keybrake.issue("kestra-x", cap_usd="1.001")', "daily_usd_cap"),
        ('keybrake.issue("kestra-x", cap_usd=29.99)', "a float is not what the price list says"),
        ('keybrake.charged(no_such_filter="x")', "400"),
        ("keybrake.idempotency_key()", "at least one part"),
        ('keybrake.idempotency_key("2026-07", "")', "no part may be empty"),
        ('keybrake.idempotency_key("2026-07", None)', "no part may be empty"),
    ]:
        done = script(world, directory, f"import keybrake; {call}")
        assert done.returncode == 1 and words in done.stderr, (call, done.stderr)
    no_ca = script(world, directory, 'import keybrake; keybrake.issue("kestra-x", cap_usd=1)', KEYBRAKE_CA="")
    assert "KEYBRAKE_CA is not set" in no_ca.stderr
    foreign = others_ca(directory)
    done = script(world, directory, 'import keybrake; keybrake.issue("kestra-x", cap_usd=1)', KEYBRAKE_CA=str(foreign))
    assert done.returncode == 1 and "CERTIFICATE_VERIFY_FAILED" in done.stderr, done.stderr


def others_ca(directory: Path) -> Path:
    """Certificates of others: those that requests brings."""
    return Path(shutil.copy(certifi.where(), directory / "foreign.pem"))


def test_a_sidecar_that_is_down_for_a_moment_is_waited_for(own_world: World, directory: Path) -> None:
    own_world.sidecar.issuer_key()
    own_world.sidecar.stop()
    mint = 'import keybrake; print("up"); print(keybrake.issue("kestra-x", cap_usd=1).label)'
    with ThreadPoolExecutor(1) as aside:
        waiting = aside.submit(script, own_world, directory, mint)
        own_world.sidecar.start()
        done = waiting.result()
    assert done.returncode == 0 and done.stdout.split() == ["up", "kestra-x"], done.stderr


def test_a_key_is_made_from_what_is_billed_alone() -> None:
    sys.path.insert(0, str(FILES))
    try:
        import keybrake
    finally:
        sys.path.remove(str(FILES))
    key = keybrake.idempotency_key("2026-07", "cus_9", "L1")
    assert key == keybrake.idempotency_key("2026-07", "cus_9", "L1")
    # As anybody can make it: charge_plain.yaml and charge.mjs do.
    billed = json.dumps(["2026-07", "cus_9", "L1"], separators=(",", ":")).encode()
    assert key == f"content-{hashlib.sha256(billed).hexdigest()}"
    others = [("2026-08", "cus_9", "L1"), ("2026-07", "cus_9L1"), ("2026-07", "cus_9", "L", "1")]
    assert key not in {keybrake.idempotency_key(*parts) for parts in others}
    assert keybrake.usd(2999) == Decimal("29.99")


def test_the_plain_form_in_node(world: World, customer: str, directory: Path) -> None:
    home = setup.node_home(Path(sys.executable))
    (directory / "node_modules").symlink_to(home / "node_modules")
    command = [str(setup.node(home)), "charge.mjs"]
    ca = str(world.sidecar.ca)
    first, again = (told(run(world, directory, command, NODE_EXTRA_CA_CERTS=ca)) for _ in range(2))
    assert (first["replayed"], again["replayed"]) == (False, True)
    assert first["id"] == again["id"] and len(world.standin.executed(customer)) == 1
    untrusted = run(world, directory, command)
    assert untrusted.returncode == 1 and len(world.standin.executed(customer)) == 1


def test_node_python_and_the_helper_make_one_key_of_one_line(world: World, customer: str, directory: Path) -> None:
    home = setup.node_home(Path(sys.executable))
    (directory / "node_modules").symlink_to(home / "node_modules")
    (plain,) = scripts_of("charge_plain")
    given = {"NODE_EXTRA_CA_CERTS": str(world.sidecar.ca), "EXECUTION": "4XyFirst"}
    # Unlike the helper the plain form asks a proxy that the environment names.
    given["NO_PROXY"] = "localhost"
    for count, name in enumerate(["Größe-1 €😀", 7], start=1):
        line = {"line_id": name, "customer": customer, "plan": "pro", "cents": PRO_CENTS}
        (directory / "line.json").write_text(json.dumps(line))
        for command in ([str(setup.node(home)), "charge.mjs"], [sys.executable, "-c", plain]):
            done = run(world, directory, command, **given)
            assert done.returncode == 0, done.stderr
        helper = f"import keybrake; print(keybrake.idempotency_key('2026-07', {customer!r}, {name!r}))"
        key = script(world, directory, helper).stdout.strip()
        assert len(world.standin.executed(customer)) == count
        assert len(world.sidecar.audit(idempotency_key=key, outcome="spent")) == 1
    (directory / "line.json").write_text(json.dumps({"customer": customer, "plan": "pro", "cents": PRO_CENTS}))
    nameless = run(world, directory, [str(setup.node(home)), "charge.mjs"], **given)
    assert nameless.returncode == 1 and "must all be given" in nameless.stderr
    assert len(world.standin.executed(customer)) == 2
