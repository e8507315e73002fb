#!/usr/bin/env python3
"""Runs the flows of kestra/flows on the real Kestra engine, through every accident that it makes, with and without Keybrake.

Each situation is run twice: by the unsafe flow, with a Stripe key and nothing else, and by ours. What is counted is what
the stand-in for Stripe *executed*; then the sidecar's ledger and audit log must tell the same. Kestra's own state decides
nothing. Exits 1 when our flow charged what it should not, and also when an unsafe flow did not: then nothing was shown.

Kestra is the one at KESTRA_URL (with KESTRA_USER and KESTRA_PASSWORD; on this machine, and never killed here), else its
released jar, the official image, or its released engine alone: the first that is to be had. Everything of ours listens on
loopback and ends with it. E2E_VERSIONS picks versions ("1.3 2.0"), E2E_ONLY situations by a part of their title. When there is
no Kestra at all the exit code is 69, or with E2E_MAY_MISS=1 it is 0: it says so loudly.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "py"), str(HERE)]

from rig import server  # noqa: E402
from rig.engine import EXIT_MISSING, EmbeddedKestra, Execution, Kestra, KestraRefused, NoKestra  # noqa: E402
from rig.http import Refused  # noqa: E402
from rig.process import REPO, RigError, wait_until  # noqa: E402
from rig.sidecar import Sidecar  # noqa: E402
from rig.standin import Standin  # noqa: E402

KESTRA = REPO / "kestra"
NAMESPACE = "company.billing"
VERSIONS = ("1.3.31", "2.0.0")
WEBHOOK_KEY = "e2e-webhook-key"
PERIOD = "2026-07"
# The flows as they are, but for their pace: nobody wants to wait for it.
PACE = ("PT15S", "PT1S")
AT_A_TIME = 3
EXECUTION_TIMEOUT_S = 180.0
E2E_TIMEOUT_S = 2400
# After an execution has ended something of it may still charge: Kestra 2.0.0 runs retried tasks twice.
QUIET_S = 4.0
ITEMS = 30
WRONG_ITEM = 12
WRONG_FACTOR = 100
# Longer than Kestra takes to be back and to run the task again.
LONG_TASK_S = 150


@dataclass(frozen=True)
class Side:
    """One of the two ways to bill."""

    name: str
    prefix: str

    def flow(self, name: str) -> str:
        return f"{self.prefix}{name}"


UNSAFE = Side("unsafe", "unsafe_")
OURS = Side("ours", "")
SIDES = (UNSAFE, OURS)


@dataclass
class Count:
    """What Stripe executed for a side in one situation."""

    charges: int
    detail: str = ""


class World:
    """One version of Kestra, a sidecar, and a stand-in for Stripe."""

    def __init__(self, version: str, workdir: Path, stack: ExitStack) -> None:
        self.version = version
        self.workdir = workdir
        self.plans = workdir / "plans"
        self.plans.mkdir()
        self.standin = stack.enter_context(Standin(workdir))
        self.sidecar = stack.enter_context(
            Sidecar(workdir, stripe_base=self.standin.url, stripe_key=self.standin.secret_key)
        )
        self.kestra: Kestra = stack.enter_context(
            server.obtain(version, workdir, self.worker_environment())
        )
        # One that runs already was started by somebody else, who gave it an environment of its own.
        self.foreign = type(self.kestra) is server.ServerKestra
        self.flows = KESTRA / "flows" / self.kestra.dialect

    def worker_environment(self) -> dict[str, str]:
        secrets = {
            "KEYBRAKE_ISSUER_KEY": self.sidecar.issuer_key(),
            "STRIPE_SECRET_KEY": self.standin.secret_key,
            "WEBHOOK_KEY": WEBHOOK_KEY,
        }
        return {
            "ENV_KEYBRAKE_URL": self.sidecar.url,
            "ENV_KEYBRAKE_CA": str(self.sidecar.ca),
            "ENV_STRIPE_API_BASE": self.standin.url,
            "E2E_DIR": str(self.plans),
            **{f"SECRET_{name}": base64.b64encode(value.encode()).decode() for name, value in secrets.items()},
        }

    def load(self) -> int:
        """Validates and loads every flow of this version, and the namespace files. Answers how many flows."""
        for file in (KESTRA / "files").iterdir():
            if file.is_file():
                self.kestra.put_file(NAMESPACE, file.name, file.read_bytes())
        bookkeeping = (HERE / "files" / "bookkeeping.py").read_text()
        if self.foreign:
            bookkeeping = bookkeeping.replace('os.environ["E2E_DIR"]', repr(str(self.plans)))
        self.kestra.put_file(NAMESPACE, "bookkeeping.py", bookkeeping.encode())
        self.kestra.put_file(NAMESPACE, "lines.json", b"[]")
        sources = sorted(self.flows.rglob("*.yaml"))
        # A parent names its child, which must be there.
        for path in sorted(sources, key=lambda path: "parent" in path.name):
            source = path.read_text()
            wrong = self.kestra.validate(source)
            if wrong:
                raise RigError(f"{path.relative_to(REPO)} is refused by Kestra {self.version}: {wrong}")
            self.kestra.load(self.given(source).replace(*PACE))
        return len(sources)

    def given(self, source: str) -> str:
        """The flow as it is; for a Kestra with another environment, with ours written into it."""
        if not self.foreign:
            return source
        for name, value in self.worker_environment().items():
            kind, _, rest = name.partition("_")
            for asked in (f"{{{{ envs.{rest.lower()} }}}}", f"{{{{ secret('{rest}') }}}}"):
                told = base64.b64decode(value).decode() if kind == "SECRET" else value
                source = source.replace(asked, told)
        return source.replace("{{ envs.stripe_api_base ?? 'https://api.stripe.com' }}", self.standin.url)

    def scripts(self) -> list[int]:
        """Scripts that run; of a foreign Kestra nobody knows."""
        return [] if self.foreign else self.kestra.scripts()

    # What a situation is made of.

    def line(self, side: Side, name: str, plan: str = "pro", cents: int | None = None) -> dict[str, Any]:
        prices = json.loads((KESTRA / "files" / "prices.json").read_text())
        customer = f"cus_{side.name}_{name}"
        return {"id": f"evt_{side.name}_{name}", "line_id": f"{side.name}-{name}", "customer": customer, "plan": plan,
                "cents": prices[plan] if cents is None else cents}

    def after(self, line: dict[str, Any], prefix: str = "", **plan: int) -> None:
        """What the script meets after its charge."""
        (self.plans / f"{prefix}{line['line_id']}.json").write_text(json.dumps(plan))

    def attempts(self, line: dict[str, Any]) -> list[int]:
        """Processes that came past the charge of this line, by their ids."""
        found = [path for path in self.plans.glob(f"{line['line_id']}.*") if path.suffix != ".json"]
        return [int(path.read_text() or 0) for path in sorted(found)]

    def start(self, side: Side, flow: str, line: Any, **inputs: Any) -> str:
        named = "lines" if isinstance(line, list) else "line"
        given = {named: json.dumps(line).encode(), **inputs}
        if side is OURS:
            given.setdefault("period", PERIOD)
        given = {name: value for name, value in given.items() if value is not None}
        return self.kestra.run(NAMESPACE, side.flow(flow), given)

    def end(self, execution: str) -> Execution:
        """The execution at its end. Something of it may still run: `quiet` waits for that."""
        return self.kestra.wait(execution, EXECUTION_TIMEOUT_S)

    def executed(self, *lines: dict[str, Any]) -> list[dict[str, Any]]:
        customers = {line["customer"] for line in lines}
        return [row for row in self.standin.executed() if row["customer"] in customers]

    def count(self, line: dict[str, Any]) -> Count:
        return Count(len(self.executed(line)))

    def quiet(self) -> None:
        """Waits until no script runs and nothing has charged for a while."""
        wait_until("all scripts have ended", lambda: not self.scripts(), EXECUTION_TIMEOUT_S)
        settled(lambda: (len(self.standin.executed()), self.scripts()))


def settled(look: Callable[[], Any]) -> None:
    """Waits until something has stayed as it is for a while."""
    deadline = time.monotonic() + EXECUTION_TIMEOUT_S
    last, since = look(), time.monotonic()
    while time.monotonic() - since < QUIET_S:
        if time.monotonic() > deadline:
            raise RigError("it does not come to rest")
        time.sleep(0.2)
        now = look()
        if now != last:
            last, since = now, time.monotonic()


# The situations.


def retried(world: World, side: Side) -> Callable[[], Count]:
    line = world.line(side, "retried")
    world.after(line, fail_first=3)
    world.end(world.start(side, "charge_retry", line))
    return lambda: world.count(line)


def retried_second(world: World, side: Side) -> Callable[[], Count]:
    line = world.line(side, "second")
    world.after(line, fail_first=99)
    world.end(world.start(side, "charge_preflight", line))
    return lambda: Count(len(world.executed(line)), f"{len(world.attempts(line))} runs of the task")


def plain(world: World, side: Side) -> Callable[[], Count]:
    line = world.line(side, "plain")
    world.after(line, fail_first=2)
    world.end(world.start(side, "charge_plain" if side is OURS else "charge_retry", line))
    return lambda: world.count(line)


def items(world: World, side: Side) -> Callable[[], Count]:
    lines = [world.line(side, f"item{n:02}", "basic") for n in range(ITEMS)]
    lines[WRONG_ITEM]["cents"] *= WRONG_FACTOR
    world.end(world.start(side, "charge_items", lines))

    def judge() -> Count:
        executed = world.executed(*lines)
        wrong = [row for row in executed if row["amount"] > lines[0]["cents"]]
        count = Count(len(executed), f"{len(wrong)} of them at ×{WRONG_FACTOR}")
        if side is OURS:
            refused = {row["code"] for row in world.sidecar.audit(decision="refused")}
            if wrong or not {"spend_cap_exceeded", "budget_stopped"} <= refused:
                count.charges = -1
            count.detail += "; the rest stopped: budget_stopped"
        return count

    return judge


def run_key(world: World, side: Side) -> Callable[[], Count]:
    lines = [world.line(side, f"run{n}") for n in range(3)]
    world.after(lines[1], fail_first=2)
    world.end(world.start(side, "run_key", lines))
    return lambda: Count(len(world.executed(*lines)), "three customers")


def unnamed_run(world: World, side: Side) -> Callable[[], Count]:
    """A run that no business id names, replayed: its root, the correlation id, is what stays the same."""
    lines = [world.line(side, f"unnamed{n}") for n in range(2)]
    execution = world.start(side, "run_key", lines, **({"period": None} if side is OURS else {}))
    world.end(execution)
    world.end(world.kestra.replay(execution))
    return lambda: Count(len(world.executed(*lines)), "two customers")


def overlap(world: World, side: Side) -> Callable[[], Count]:
    lines = [world.line(side, f"monthly{n}") for n in range(2)]
    world.kestra.put_file(NAMESPACE, "lines.json", json.dumps(lines).encode())
    inputs = {"period": PERIOD} if side is OURS else {}
    both = [world.kestra.run(NAMESPACE, side.flow("monthly_run"), inputs) for _ in range(2)]
    for execution in both:
        world.end(execution)
    return lambda: Count(len(world.executed(*lines)), "two customers")


def at_once(world: World, side: Side) -> Callable[[], Count]:
    line = world.line(side, "atonce")
    for execution in [world.start(side, "charge_retry", line) for _ in range(2)]:
        world.end(execution)
    return lambda: world.count(line)


def scheduled(world: World, side: Side) -> Callable[[], Count]:
    """The schedule fires again and again within one period."""
    lines = [world.line(side, "tick")]
    world.kestra.put_file(NAMESPACE, "lines.json", json.dumps(lines).encode())
    path = world.flows / ("unsafe" if side is UNSAFE else "") / "monthly_run.yaml"
    name = side.flow("monthly_run_often")
    source = path.read_text()
    # A flow of its own: a trigger that Kestra knows keeps its next date when its schedule changes.
    changes = {f"id: {side.flow('monthly_run')}": f"id: {name}",
               'cron: "0 6 1 * *"': 'cron: "*/3 * * * * *"\n    withSeconds: true'}
    for before, after in changes.items():
        if before not in source:
            raise RigError(f"{path} does not say {before!r}")
        source = source.replace(before, after, 1)

    def ended() -> list[Execution]:
        return [one for one in world.kestra.executions(NAMESPACE, name) if one.terminal]

    source = world.given(source)
    world.kestra.load(source)
    try:
        wait_until("two ticks have run", lambda: len(ended()) >= 2, EXECUTION_TIMEOUT_S)
    finally:
        world.kestra.load(f"{source}disabled: true\n")
        # One that fires late would read the other side's lines.
        settled(lambda: [(one.id, one.terminal) for one in world.kestra.executions(NAMESPACE, name)])
    return lambda: Count(len(world.executed(*lines)), f"{len(ended())} executions")


def webhook(world: World, side: Side) -> Callable[[], Count]:
    event = world.line(side, "webhook")
    twice = [world.kestra.webhook(NAMESPACE, side.flow("webhook_charge"), WEBHOOK_KEY, event) for _ in range(2)]
    for execution in twice:
        world.end(execution)
    return lambda: world.count(event)


def parent_retried(world: World, side: Side) -> Callable[[], Count]:
    line = world.line(side, "parent")
    world.after(line, fail_first=1)
    world.end(world.start(side, "billing_parent", line))
    return lambda: world.count(line)


def parent_restarted(world: World, side: Side) -> Callable[[], Count]:
    line = world.line(side, "parent-restarted")
    world.after(line, fail_first=2)
    execution = world.start(side, "billing_parent", line)
    world.end(execution)
    world.kestra.restart(execution)
    wait_until("the child ran again", lambda: len(world.attempts(line)) >= 3, EXECUTION_TIMEOUT_S)
    return lambda: world.count(line)


def parent_replayed(world: World, side: Side) -> Callable[[], Count]:
    line = world.line(side, "parent-replayed")
    execution = world.start(side, "billing_parent", line)
    world.end(execution)
    world.end(world.kestra.replay(execution))
    return lambda: world.count(line)


def restarted(world: World, side: Side) -> Callable[[], Count]:
    line = world.line(side, "restarted")
    world.after(line, fail_first=1)
    execution = world.start(side, "charge_child", line)
    world.end(execution)
    world.kestra.restart(execution)
    wait_until("the task ran again", lambda: len(world.attempts(line)) >= 2, EXECUTION_TIMEOUT_S)
    return lambda: world.count(line)


def replayed(world: World, side: Side) -> Callable[[], Count]:
    line = world.line(side, "replayed")
    execution = world.start(side, "charge_child", line)
    world.end(execution)
    world.end(world.kestra.replay(execution))
    return lambda: world.count(line)


def killed(world: World, side: Side) -> Callable[[], Count]:
    """The execution is killed after its charge, and started anew by somebody who saw KILLED."""
    line = world.line(side, "killed")
    world.after(line, sleep_first=1, sleep_s=LONG_TASK_S)
    execution = world.start(side, "charge_child", line)
    wait_until("the charge was made", lambda: world.attempts(line), EXECUTION_TIMEOUT_S)
    world.kestra.kill(execution)
    world.end(execution)
    world.end(world.start(side, "charge_child", line))
    return lambda: world.count(line)


def declined(world: World, side: Side) -> Callable[[], Count]:
    """Counts how often the card issuer was asked."""
    line = world.line(side, "declined")
    world.standin.fault("decline", 50, customer=line["customer"])
    world.end(world.start(side, "charge_retry", line))

    def judge() -> Count:
        sent = [seen for seen in world.standin.requests() if line["customer"] in seen["body"]]
        keys = {seen["headers"].get("idempotency-key") for seen in sent}
        if world.executed(line):
            return Count(-1, "charged in spite of it")
        return Count(len(keys), f"asked of the issuer, {len(sent)} requests")

    return judge


def in_flight(world: World, side: Side) -> Callable[[], Count]:
    """Whoever stands between the script and Stripe dies with the charge in flight; the task is retried."""
    line = world.line(side, "inflight")
    if side is UNSAFE:
        # No sidecar to kill: what stands between is cut on the way back.
        world.standin.fault("drop_after", 1, customer=line["customer"])
        world.end(world.start(side, "charge_retry", line))
    else:
        world.standin.fault("hold_after", 1, customer=line["customer"])
        execution = world.start(side, "charge_retry", line)
        wait_until("the charge is in flight", lambda: world.executed(line), EXECUTION_TIMEOUT_S)
        world.sidecar.kill()
        world.standin.release()
        world.sidecar.start()
        world.end(execution)
    return lambda: world.count(line)


def worker_lost(world: World, how: Callable[[], None], name: str) -> dict[Side, Count]:
    """The worker goes while both sides' scripts are busy after their charge, and comes back."""
    lines = {side: world.line(side, name) for side in SIDES}
    for side, line in lines.items():
        world.after(line, sleep_first=1, sleep_s=LONG_TASK_S)
        world.start(side, "charge_child", line)
    for line in lines.values():
        wait_until("the charge was made", lambda: world.attempts(line), EXECUTION_TIMEOUT_S)
    how()
    world.kestra.start()
    for line in lines.values():
        wait_until("the task was run again", lambda: len(world.attempts(line)) >= 2, EXECUTION_TIMEOUT_S)
    details = {side: beside(world.attempts(line)[0]) for side, line in lines.items()}
    for line in lines.values():
        end_process(world.attempts(line)[0])
    world.quiet()
    return {side: Count(len(world.executed(line)), details[side]) for side, line in lines.items()}


def beside(pid: int) -> str:
    return "the old script still running beside it" if alive(pid) else "the old script ended"


def alive(pid: int) -> bool:
    try:
        return "Z" != Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def end_process(pid: int) -> None:
    if alive(pid):
        os.kill(pid, signal.SIGKILL)


def kill_switch(world: World) -> list[Claim]:
    """The flow for the person on call, on and off, with a charge between."""
    line = world.line(OURS, "switched")

    def switch(on: bool) -> str:
        inputs = {"admin_key": world.sidecar.admin_key, "stop": on, "reason": "amounts look wrong: {{ 6 * 7 }}"}
        return world.end(world.kestra.run(NAMESPACE, "kill_switch", inputs)).state

    states = [switch(True)]
    world.end(world.start(OURS, "charge_child", line))
    during = len(world.executed(line))
    states.append(switch(False))
    world.end(world.start(OURS, "charge_child", line))
    after = len(world.executed(line))
    told = [row for row in world.sidecar.audit(events="all") if "{{ 6 * 7 }}" in json.dumps(row)]
    return [
        Claim("the kill switch flow works", states == ["SUCCESS", "SUCCESS"], str(states)),
        Claim("nothing is charged while the switch is on", during == 0, f"{during} charges"),
        Claim("and the same call is made once it is off", after == 1, f"{after} charges"),
        Claim("its reason is recorded as it was written", len(told) == 2, f"{len(told)} records"),
    ]


@dataclass(frozen=True)
class Claim:
    what: str
    held: bool
    detail: str = ""


@dataclass
class Situation:
    title: str
    run: Callable[[World, Side], Callable[[], Count]]
    # How many charges are executed without Keybrake, by dialect, and how many with it: the least and the most.
    unsafe: dict[str, tuple[int, int]]
    ours: tuple[int, int] = (1, 1)
    # One after the other: they share a file of the namespace.
    lines_file: bool = False


def both(least: int, most: int | None = None) -> dict[str, tuple[int, int]]:
    return {dialect: (least, least if most is None else most) for dialect in ("1.3", "2.0")}


SITUATIONS = [
    Situation("task retried 3 times after the charge", retried, both(4)),
    Situation("the same as second task of its list", retried_second, {"1.3": (4, 4), "2.0": (5, 8)}),
    Situation("the same without the helper, an own idempotency key", plain, both(3)),
    Situation(f"{ITEMS} parallel items, one at ×{WRONG_FACTOR}", items, both(ITEMS), (0, ITEMS - 1)),
    Situation("one key for a run, which fails half-way twice", run_key, both(7), (3, 3)),
    Situation("a run without a name of its own, replayed", unnamed_run, both(4), (2, 2)),
    Situation("two executions of one period", overlap, both(4), (2, 2), lines_file=True),
    Situation("two executions at once, nothing serialises them", at_once, both(2)),
    Situation("the schedule fires again within the period", scheduled, both(2, 40), lines_file=True),
    Situation("webhook delivered twice", webhook, both(2)),
    Situation("parent task retried, a new child, keys re-issued", parent_retried, both(2)),
    Situation("subflow retried, then its parent restarted", parent_restarted, both(3)),
    Situation("parent replayed", parent_replayed, both(2)),
    Situation("execution restarted", restarted, both(2)),
    Situation("execution replayed", replayed, both(2)),
    Situation("execution killed after the charge, started anew", killed, both(2)),
    Situation("card declined, retried 3 times", declined, both(4)),
]
ALONE = [Situation("killed with the charge in flight, then retried", in_flight, both(2))]
CRASHES = [
    ("worker killed after the charge, task resubmitted", "lost", lambda kestra: kestra.crash()),
    ("worker stopped, grace shorter than the task", "stopped", lambda kestra: kestra.stop()),
]


@dataclass
class Row:
    version: str
    title: str
    counts: dict[Side, Count]
    expected: dict[Side, tuple[int, int]]

    @property
    def held(self) -> bool:
        return all(least <= self.counts[side].charges <= most for side, (least, most) in self.expected.items())

    def cell(self, side: Side) -> str:
        count, (least, most) = self.counts[side], self.expected[side]
        wrong = "" if least <= count.charges <= most else f" (must be {least} to {most})"
        return f"{count.charges}{wrong}"

    def as_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "situation": self.title,
            **{side.name: {"executed": count.charges, "detail": count.detail} for side, count in self.counts.items()},
            "held": self.held,
        }


def attempt(one: Situation, world: World, side: Side) -> Callable[[], Count]:
    """Runs a situation; one that cannot be made says why, and the others go on."""
    try:
        return one.run(world, side)
    except (RigError, Refused, KestraRefused) as error:
        why = f"could not be made: {str(error).splitlines()[0]}"
        return lambda: Count(-1, why)


class E2e:
    def __init__(self, only: str, quiet: bool) -> None:
        self.only = only
        self.quiet = quiet
        self.rows: list[Row] = []
        self.claims: list[Claim] = []

    def say(self, text: str = "") -> None:
        if not self.quiet:
            print(text, flush=True)

    def wanted(self, situations: Iterable[Situation]) -> list[Situation]:
        return [one for one in situations if self.only in one.title]

    def version(self, version: str, workdir: Path) -> None:
        began = time.monotonic()
        with ExitStack() as stack:
            world = World(version, workdir, stack)
            self.say(f"\nKestra {world.kestra.version}: {world.kestra.how}, ready after {time.monotonic() - began:.0f} s")
            loaded = world.load()
            self.claim(Claim(f"{loaded} flows are valid on Kestra {world.kestra.version}", loaded > 0))
            dialect = world.kestra.dialect

            file = threading.Lock()

            def run(one: Situation) -> tuple[Situation, dict[Side, Callable[[], Count]]]:
                with file if one.lines_file else contextlib.nullcontext():
                    return one, {side: attempt(one, world, side) for side in SIDES}

            with ThreadPoolExecutor(AT_A_TIME) as pool:
                done = list(pool.map(run, self.wanted(SITUATIONS)))
            done += [run(one) for one in self.wanted(ALONE)]
            world.quiet()
            for one, judges in done:
                counts = {side: judge() for side, judge in judges.items()}
                self.row(Row(world.kestra.version, one.title, counts, {UNSAFE: one.unsafe[dialect], OURS: one.ours}))
            if self.only in "kill switch":
                for claim in kill_switch(world):
                    self.claim(claim)
            if isinstance(world.kestra, (server.JarKestra, EmbeddedKestra)):
                for title, name, how in CRASHES:
                    if self.only in title:
                        counts = worker_lost(world, lambda: how(world.kestra), name)
                        self.row(Row(world.kestra.version, title, counts, {UNSAFE: (2, 2), OURS: (1, 1)}))
            self.ledger(world)
        self.say(f"  {time.monotonic() - began:.0f} s")

    def ledger(self, world: World) -> None:
        """The sidecar's own books tell what Stripe executed, and nothing is left open."""
        executed = [row for row in world.standin.executed() if row["customer"].startswith("cus_ours_")]
        rows = [row for row in world.sidecar.audit(outcome="spent") if row["object_id"]]
        verified = world.sidecar.verify_audit()
        on = f"on {world.kestra.version}"
        told, moved = sorted(row["object_id"] for row in rows), sorted(row["object_id"] for row in executed)
        self.claim(Claim(f"the audit log has each executed charge once {on}", told == moved, f"{len(told)} of {len(moved)}"))
        self.claim(Claim(f"no hold is left in doubt {on}", not world.sidecar.holds_in_doubt()))
        self.claim(Claim(f"the audit chain is whole {on}", verified["exit_code"] == 0, json.dumps(verified)[:200]))
        executions = {row["metadata"].get("execution") for row in rows if row["metadata"]}
        self.claim(Claim(f"each charge names its execution {on}", None not in executions and len(executions) > 0))

    def row(self, row: Row) -> None:
        self.rows.append(row)
        mark = "  " if row.held else "!!"
        details = "; ".join(f"{side.name}: {count.detail}" for side, count in row.counts.items() if count.detail)
        self.say(f"{mark} {row.title:<55} {row.cell(UNSAFE):>8} {row.cell(OURS):>6}   {details}")

    def claim(self, claim: Claim) -> None:
        self.claims.append(claim)
        self.say(f"{'  ' if claim.held else '!!'} {claim.what}{'' if claim.held else ': ' + claim.detail}")

    def report(self) -> None:
        """The table over all versions, as Markdown."""
        versions = list(dict.fromkeys(row.version for row in self.rows))
        self.say("\n| charges executed | " + " | ".join(f"{v}, unsafe | {v}, ours" for v in versions) + " |")
        self.say("|---|" + "---|" * 2 * len(versions))
        for title in dict.fromkeys(row.title for row in self.rows):
            of = {row.version: row for row in self.rows if row.title == title}
            cells = [of[v].cell(side) if v in of else "–" for v in versions for side in SIDES]
            self.say(f"| {title} | " + " | ".join(cells) + " |")

    @property
    def held(self) -> bool:
        return bool(self.rows) and all(row.held for row in self.rows) and all(claim.held for claim in self.claims)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the result as JSON, and nothing else on stdout")
    parser.add_argument("--keep", action="store_true", help="keep the logs of a run that held, too")
    arguments = parser.parse_args()
    e2e = E2e(os.environ.get("E2E_ONLY", ""), arguments.json)
    picked = os.environ.get("E2E_VERSIONS", "").split()
    versions = [version for version in VERSIONS if not picked or any(version.startswith(one) for one in picked)]
    if os.environ.get("KESTRA_URL"):
        versions = versions[:1]

    def late(*_: object) -> None:
        raise TimeoutError(f"the run took longer than {E2E_TIMEOUT_S} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(E2E_TIMEOUT_S)
    workdir = Path(tempfile.mkdtemp(prefix="keybrake-e2e-"))
    try:
        for version in versions:
            directory = workdir / version
            directory.mkdir()
            e2e.version(version, directory)
    except NoKestra as nothing:
        print(f"\n!!! e2e: NOTHING WAS RUN: {nothing}\n", file=sys.stderr)
        return 0 if os.environ.get("E2E_MAY_MISS") else EXIT_MISSING
    except (RigError, Refused, KestraRefused, TimeoutError):
        traceback.print_exc()
        print(f"e2e: the logs are in {workdir}", file=sys.stderr)
        return 1
    e2e.report()
    if arguments.json:
        rows = [row.as_json() for row in e2e.rows]
        claims = [dataclasses.asdict(claim) for claim in e2e.claims]
        print(json.dumps({"held": e2e.held, "situations": rows, "claims": claims}, indent=1))
    if e2e.held and not arguments.keep:
        shutil.rmtree(workdir)
    else:
        print(f"e2e: the logs are in {workdir}", file=sys.stderr)
    passed = sum(row.held for row in e2e.rows) + sum(claim.held for claim in e2e.claims)
    e2e.say(f"\n{passed} passed, {len(e2e.rows) + len(e2e.claims) - passed} failed")
    return 0 if e2e.held else 1


if __name__ == "__main__":
    sys.exit(main())
