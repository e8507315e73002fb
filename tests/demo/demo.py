#!/usr/bin/env python3
"""Shows what a Kestra billing flow charges without Keybrake and with it: the real Stripe SDK, a stand-in for Stripe.

Five approaches go through the same three accidents, each attempt in a fresh process as Kestra starts it; then the
sidecar is killed between Stripe's execution and the answer. Every number is what the stand-in executed. Exits 1 when
a guarantee does not hold, and also when an approach that should lose money does not: then nothing would be shown.

Offline once cargo has built and tests/sdk/setup.py has installed. Everything listens on loopback and ends with it.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Dict

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "py"))

from rig.kestra import Attempt, Task, finish  # noqa: E402
from rig.process import RigError, wait_until  # noqa: E402
from rig.sidecar import Sidecar  # noqa: E402
from rig.standin import Standin  # noqa: E402

SETUP = HERE.parent / "sdk" / "setup.py"
SETUP_TIMEOUT_S = 1800
# For a machine that is busy with other things; alone it takes about half a minute on two cores.
DEMO_TIMEOUT_S = 600

PERIOD = "2026-07"
# As long as Stripe is quick: calls of two runs must have time to meet.
STRIPE_LATENCY_MS = 40
# Kestra's `retry: {maxAttempts: 3}` after the first one.
RETRY_ATTEMPTS = 4
ITEM_ATTEMPTS = 2
ITEMS_AT_A_TIME = 8
RUN_ATTEMPTS = 4
RUN_INTERVAL_S = 0.3

RETRIED = ["cus_retried"]
ITEMS = [f"cus_item_{n:02}" for n in range(1, 21)]
WRONG_ITEM = "cus_item_13"
WRONG_FACTOR = 100
RUN = [f"cus_run_{n}" for n in range(1, 6)]
# What each customer owes, from a source that no task computes.
PRICE_LIST = {name: (1499, 2999, 4999)[n % 3] for n, name in enumerate(RETRIED + ITEMS + RUN)}

ACCIDENTS = {"retry": RETRIED, "amount": ITEMS, "overlap": RUN}

Record = Dict[str, Any]


@dataclass(frozen=True)
class Approach:
    name: str
    script: str
    # Through the sidecar, and who mints: the task itself, or the flow before it.
    sidecar: bool
    flow_mints: bool
    # The accidents in which this approach loses money.
    loses: frozenset[str]


APPROACHES = [
    Approach("raw Stripe key", "task_plain.py", False, False, frozenset({"retry", "amount", "overlap"})),
    Approach("idempotency key only", "task_idempotent.py", False, False, frozenset({"amount"})),
    Approach("vault key only (client mode)", "task_vault.py", True, False, frozenset({"retry", "overlap"})),
    Approach("idempotency key + vault key", "task_idempotent_vault.py", True, False, frozenset()),
    Approach("unchanged script + vault key (content mode)", "task_plain.py", True, True, frozenset()),
]


@dataclass
class Row:
    approach: Approach
    wanted: dict[str, list[int]]
    executed: dict[str, list[int]]
    stopped_by: list[str] = field(default_factory=list)

    def over_cents(self, customers: list[str]) -> int:
        """What these customers paid beyond what they owe."""
        return sum(max(0, sum(self.executed[name]) - sum(self.wanted[name])) for name in customers)

    def as_json(self) -> dict[str, Any]:
        everyone = list(self.wanted)
        return {
            "approach": self.approach.name,
            "charges_wanted": sum(len(amounts) for amounts in self.wanted.values()),
            "charges_executed": sum(len(amounts) for amounts in self.executed.values()),
            "wanted_usd": usd(sum(sum(amounts) for amounts in self.wanted.values())),
            "executed_usd": usd(sum(sum(amounts) for amounts in self.executed.values())),
            "over_usd": usd(self.over_cents(everyone)),
            "over_usd_by_accident": {name: usd(self.over_cents(who)) for name, who in ACCIDENTS.items()},
            "stopped_by": self.stopped_by or ["nothing"],
        }


class Demo:
    """Collects what happened, and tells it while it happens unless a machine is listening."""

    def __init__(self, python: Path, workdir: Path, quiet: bool) -> None:
        self.python = python
        self.workdir = workdir
        self.quiet = quiet
        self.guarantees: list[dict[str, Any]] = []
        self.price_list = workdir / "price_list.json"
        self.price_list.write_text(json.dumps(PRICE_LIST))

    def say(self, text: str = "") -> None:
        if not self.quiet:
            print(text, flush=True)

    def claim(self, what: str, held: bool, detail: str = "") -> None:
        """One guarantee, and whether it held."""
        self.guarantees.append({"guarantee": what, "held": bool(held), "detail": detail})
        if not held:
            self.say(f"     BROKEN: {what} ({detail})")

    def directory(self, name: str) -> Path:
        path = self.workdir / name
        path.mkdir()
        return path

    # The table.

    def row(self, number: int, approach: Approach) -> Row:
        self.say(f"{number}. {approach.name}  ({approach.script})")
        with ExitStack() as stack:
            workdir = self.directory(f"row{number}")
            standin = stack.enter_context(Standin(workdir, STRIPE_LATENCY_MS))
            sidecar = stack.enter_context(sidecar_of(workdir, standin)) if approach.sidecar else None
            flow = Flow(self, approach, standin, sidecar)
            # One attempt after the other leaves a core idle; its customer is nobody else's.
            with ThreadPoolExecutor(1) as aside:
                retried = aside.submit(flow.run_retry)
                items = flow.run_items()
            flow.judge_retry(retried.result())
            flow.judge_items(items)
            flow.overlap()
            row = Row(
                approach,
                wanted={name: [cents] for name, cents in PRICE_LIST.items()},
                executed={name: [] for name in PRICE_LIST},
            )
            for money in standin.executed():
                row.executed[money["customer"]].append(money["amount"])
            row.stopped_by = stopped_by(standin, sidecar)
            self.judge(row, standin, sidecar)
        return row

    def judge(self, row: Row, standin: Standin, sidecar: Sidecar | None) -> None:
        name = row.approach.name
        for accident, customers in ACCIDENTS.items():
            over = row.over_cents(customers)
            if accident in row.approach.loses:
                self.claim(f"{name}: {accident} loses money", over > 0, f"{usd(over)} USD over")
            else:
                wrong = {who: row.executed[who] for who in customers if row.executed[who] != row.wanted[who]}
                self.claim(f"{name}: {accident} charges exactly what is owed", not wrong, f"{wrong or ''}")
        if sidecar:
            spent = sorted(record["object_id"] for record in sidecar.audit(outcome="spent"))
            moved = sorted(money["object_id"] for money in standin.executed())
            self.claim(
                f"{name}: the audit log names every charge once", spent == moved, f"{len(spent)} of {len(moved)}"
            )

    def told(self, standin: Standin, customers: list[str], what: str) -> None:
        amounts = [money["amount"] for money in standin.executed() if money["customer"] in customers]
        owed = [PRICE_LIST[name] for name in customers]
        self.say(
            f"     {what:<66} {len(amounts):>2} charges for {len(owed):>2}, "
            f"{usd(sum(amounts)):>8} for {usd(sum(owed)):>7} USD"
        )

    # The crash.

    def crash(self) -> dict[str, Any]:
        self.say("The sidecar dies between Stripe's execution and the answer  (task_idempotent_vault.py)")
        customer = RETRIED[0]
        with ExitStack() as stack:
            workdir = self.directory("crash")
            standin = stack.enter_context(Standin(workdir, STRIPE_LATENCY_MS))
            sidecar = stack.enter_context(sidecar_of(workdir, standin))
            flow = Flow(self, APPROACHES[3], standin, sidecar)
            task = flow.task([customer])

            standin.fault("hold_after")
            process = task.start()
            try:
                wait_until("Stripe has executed the charge and keeps its answer back", standin.holding)
                sidecar.kill()
            finally:
                standin.release()
                first = finish(process)
            self.say("     Stripe has executed the charge. Its answer is on the way: kill -9 of the sidecar")
            self.say(f"     attempt 1 fails, it cannot know:       {first.failure[:76]}")
            second = task.attempt()
            self.say(f"     attempt 2 finds no sidecar, no charge: {second.failure[:76]}")
            sidecar.start()
            wait_until("recovery has found the charge", lambda: not sidecar.holds_in_doubt())
            self.say("     the sidecar is back; the charge is in doubt, until it is found at Stripe by its mark")
            third = task.attempt()
            self.say(f"     attempt 3, under a new vault key:      {third.last_line[:76]}")

            charges = standin.executed()
            records = sidecar.audit(customer=customer, events="all")
            verified = sidecar.verify_audit()
            self.claim("crash: the two attempts without an answer fail", first.exit_code != 0 and second.exit_code != 0)
            self.claim("crash: the retry succeeds", third.exit_code == 0, third.output[-400:])
            self.claim("crash: Stripe executed one charge", len(charges) == 1, f"{len(charges)} executed")
            sent = len(standin.requests())
            self.claim("crash: and sends nothing again", sent == 1, f"{sent} sent")
            spend = [sidecar.spend_today(key["id"]) for key in sidecar.keys(label=f"kestra-billing-{customer}")]
            counted = sum(Decimal(today["spent"]) + Decimal(today["held"]) for today in spend)
            self.claim(
                "crash: over both vault keys the money is counted once",
                len(spend) == 2 and counted == Decimal(usd(PRICE_LIST[customer])),
                f"{counted} USD under {len(spend)} keys",
            )
            self.judge_trail(records, charges, verified)
        self.say()
        self.say("     the audit trail of it (GET /audit?customer=…&events=all):")
        for record in records:
            self.say(
                f"       {record['seq']:>3}  {record['at']}  {record['event']:<9} {record['outcome'] or '':<8} "
                f"{record['usd'] or '':>6}  {record['object_id'] or ''}"
            )
        self.say(f"     keybrake audit verify: {'whole' if verified['exit_code'] == 0 else 'BROKEN'}")
        self.say()
        return {"charges_executed": len(charges), "audit": records, "verify": verified}

    def judge_trail(self, records: list[Record], charges: list[Record], verified: Record) -> None:
        events = [record["event"] for record in records]
        spent = [record for record in records if record["outcome"] == "spent"]
        at = {event: events.index(event) for event in ("admitted", "doubt") if event in events}
        ordered = "admitted" in at and "doubt" in at and at["admitted"] < at["doubt"]
        self.claim("crash: the trail tells of admission, then of doubt", ordered, f"{events}")
        found = [record["detail"].get("found_by") for record in records if record["event"] == "resolved"]
        self.claim("crash: the doubt was ended by the charge's mark", found == ["stamp"], f"{found}")
        self.claim(
            "crash: the trail names the one charge, then its repeat",
            bool(charges)
            and [record["object_id"] for record in spent] == [charges[0]["object_id"]]
            and events[-2:] == ["resolved", "replayed"]
            and records[-2] == spent[0]
            and spent[0]["usd"] == usd(charges[0]["amount"]),
            f"{[(record['event'], record['outcome'], record['object_id']) for record in records]}",
        )
        self.claim("crash: keybrake audit verify finds the log whole", verified["exit_code"] == 0, f"{verified}")


class Flow:
    """One approach, wired as its flow would wire it."""

    def __init__(self, demo: Demo, approach: Approach, standin: Standin, sidecar: Sidecar | None) -> None:
        self.demo = demo
        self.approach = approach
        self.standin = standin
        self.sidecar = sidecar

    def task(self, customers: list[str], amounts: dict[str, int] | None = None, **environment: str) -> Task:
        owed = {**PRICE_LIST, **(amounts or {})}
        given = {
            "BILLING_PERIOD": PERIOD,
            "ITEMS": json.dumps([{"id": name, "amount_cents": owed[name]} for name in customers]),
            "PRICE_LIST": str(self.demo.price_list),
            **self.credentials(customers),
            **environment,
        }
        return Task(self.demo.python, HERE / self.approach.script, given)

    def credentials(self, customers: list[str]) -> dict[str, str]:
        if not self.sidecar:
            # The task would reach Stripe itself; here Stripe is the stand-in.
            return {"STRIPE_SECRET_KEY": self.standin.secret_key, "STRIPE_API_BASE": self.standin.url}
        if not self.approach.flow_mints:
            return self.sidecar.flow_environment()
        # The task before this one mints, as prepare_vault_keys does: the script knows of nothing.
        cap = Decimal(sum(PRICE_LIST[name] for name in customers)) / 100 * Decimal("1.1")
        key = self.sidecar.issue(
            f"kestra-billing-{PERIOD}",
            bearer=self.sidecar.issuer_key(),
            daily_usd_cap=str(cap.quantize(Decimal("0.01"))),
            idempotency="content",
            idempotency_scope=f"billing:{PERIOD}",
        )
        return {
            "STRIPE_SECRET_KEY": key["vault_key"],
            "STRIPE_API_BASE": self.sidecar.stripe_url,
            "STRIPE_CA_FILE": str(self.sidecar.ca),
        }

    def run_retry(self) -> list[Attempt]:
        return self.task(RETRIED, DATABASE_DOWN="1").run(RETRY_ATTEMPTS)

    def judge_retry(self, attempts: list[Attempt]) -> None:
        # Each must have come past its charge: an accident that did not happen proves nothing.
        failed = [attempt for attempt in attempts if "the database is down" in attempt.failure]
        self.demo.claim(
            f"{self.approach.name}: all {RETRY_ATTEMPTS} attempts charge, then fail",
            len(failed) == RETRY_ATTEMPTS,
            attempts[-1].failure,
        )
        self.demo.told(self.standin, RETRIED, "retry: the database is down after the charge, 4 attempts")

    def run_items(self) -> dict[str, list[Attempt]]:
        wrong = {WRONG_ITEM: PRICE_LIST[WRONG_ITEM] * WRONG_FACTOR}
        tasks = [self.task([name], wrong) for name in ITEMS]
        with ThreadPoolExecutor(ITEMS_AT_A_TIME) as pool:
            return dict(zip(ITEMS, pool.map(lambda task: task.run(ITEM_ATTEMPTS), tasks)))

    def judge_items(self, ended: dict[str, list[Attempt]]) -> None:
        self.demo.told(self.standin, ITEMS, "amount: 20 items at once, one amount is 100 times too large")
        for name in ITEMS:
            if name != WRONG_ITEM:
                self.must_succeed(ended[name])
        if not self.sidecar:
            return self.must_succeed(ended[WRONG_ITEM])
        self.demo.claim(
            f"{self.approach.name}: the item of the wrong amount is told of the cap",
            all("Spend cap exceeded" in attempt.output for attempt in ended[WRONG_ITEM]),
            ended[WRONG_ITEM][-1].failure,
        )
        self.must_succeed(self.task([WRONG_ITEM]).run(ITEM_ATTEMPTS))
        self.demo.told(self.standin, ITEMS, "        … the stopped item again, its amount mended")

    def overlap(self) -> None:
        with ThreadPoolExecutor(2) as pool:
            tasks = [self.task(RUN), self.task(RUN)]
            runs = list(pool.map(lambda task: task.run(RUN_ATTEMPTS, RUN_INTERVAL_S), tasks))
        for attempts in runs:
            self.must_succeed(attempts)
        self.demo.told(self.standin, RUN, f"overlap: two runs of {PERIOD} at the same time, 5 customers")

    def must_succeed(self, attempts: list[Attempt]) -> None:
        if attempts[-1].exit_code != 0:
            raise RigError(f"{self.approach.script} failed where it should not:\n{attempts[-1].output[-2000:]}")


def sidecar_of(workdir: Path, standin: Standin) -> Sidecar:
    return Sidecar(workdir, stripe_base=standin.url, stripe_key=standin.secret_key)


def stopped_by(standin: Standin, sidecar: Sidecar | None) -> list[str]:
    """What kept money from moving, as the logs tell it."""
    if not sidecar:
        charges = [seen for seen in standin.requests() if seen["path"] == "/v1/charges"]
        repeats = len(charges) - len(standin.executed())
        return [f"Stripe's idempotency: {repeats} repeats"] if repeats else []
    records = sidecar.audit(events="all")
    repeats = sum(1 for record in records if record["decision"] == "replayed")
    capped = {record["customer"] for record in records if record["code"] == "spend_cap_exceeded"}
    told = [f"dedup: {repeats} repeats"] if repeats else []
    return told + ([f"cap: {len(capped)} item"] if capped else [])


def usd(cents: int) -> str:
    return f"{Decimal(cents) / 100:.2f}"


def print_table(rows: list[Row]) -> None:
    head = ["approach", "wanted", "executed", "wanted $", "executed $", "over $", "stopped by"]
    keys = ["approach", "charges_wanted", "charges_executed", "wanted_usd", "executed_usd", "over_usd"]
    lines = [head]
    for row in rows:
        told = row.as_json()
        lines.append([str(told[key]) for key in keys] + ["; ".join(told["stopped_by"])])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in [lines[0], ["-" * width for width in widths], *lines[1:]]:
        ends = (0, len(head) - 1)
        cells = [cell.ljust(w) if n in ends else cell.rjust(w) for n, (cell, w) in enumerate(zip(line, widths))]
        print("  ".join(cells).rstrip())


def stop_at(signal_number: int, _frame: object) -> None:
    raise SystemExit(f"demo: stopped by {signal.Signals(signal_number).name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, stop_at)
    setup = subprocess.run([sys.executable, str(SETUP)], stdout=subprocess.PIPE, text=True, timeout=SETUP_TIMEOUT_S)
    if setup.returncode != 0:
        return 1

    started = time.monotonic()
    signal.alarm(DEMO_TIMEOUT_S)
    with tempfile.TemporaryDirectory(prefix="keybrake-demo-") as directory:
        demo = Demo(Path(setup.stdout.strip()), Path(directory), arguments.json)
        demo.say(f"A billing flow of {len(PRICE_LIST)} customers, as Kestra runs it: every attempt is a fresh process.")
        demo.say("Stripe is a stand-in on this machine. What it executed is what counts.\n")
        try:
            rows = [demo.row(number, approach) for number, approach in enumerate(APPROACHES, 1)]
            demo.say()
            crash = demo.crash()
        except RigError as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1

    broken = [claim for claim in demo.guarantees if not claim["held"]]
    seconds = round(time.monotonic() - started, 1)
    if arguments.json:
        table = [row.as_json() for row in rows]
        told = {"rows": table, "crash": crash, "guarantees": demo.guarantees, "ok": not broken, "seconds": seconds}
        print(json.dumps(told, indent=2))
    else:
        print_table(rows)
        print()
        for claim in broken:
            print(f"BROKEN: {claim['guarantee']}: {claim['detail']}")
        print(f"{len(demo.guarantees) - len(broken)} of {len(demo.guarantees)} claims hold, after {seconds} s.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
