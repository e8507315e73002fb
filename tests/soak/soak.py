#!/usr/bin/env python3
"""An hour of a sidecar's life: charges, repeats, charges over the cap, reads, new and revoked keys, while Stripe fails.

A steady rate, whatever the answers do (`SOAK_RPS`, 200), for `SOAK_SECONDS` (3600). Each line of business is wanted
once and asked for again until its outcome is known, as re-runs of a flow do. Then faults end, every line is asked for
until it has an outcome, and the stand-in's list of what really moved is the judge. Exits 1 on any violation:

- each line is executed once at most, on the record, and its answer is always the same charge;
- what the ledger calls spent is what was executed, and nothing but what is in doubt is held;
- no key's executions exceed its cap;
- a doubt is left only where Stripe has stored a 500 or 424 and repeats it;
- the chain of the audit log is whole;
- memory and descriptors are flat: see MEMORY_… and DESCRIPTORS_… below;
- the load was made: at least LOAD_LEAST of the calls at their time, and no answer that nothing explains.

Everything listens on loopback and ends with it.
"""

from __future__ import annotations

import collections
import heapq
import http.client
import os
import queue
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Callable

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "py"))

from rig.http import decoded, strict_context  # noqa: E402
from rig.process import RigError  # noqa: E402
from rig.sidecar import Sidecar  # noqa: E402
from rig.standin import Standin  # noqa: E402

WORKERS = 64
ANSWER_TIMEOUT_S = 20.0
# What hangs at Stripe is a doubt after that.
UPSTREAM_TIMEOUT_MS = 3_000
STRIPE_LATENCY_MS = 5

# Keys in use at a time. A new one takes the place of the oldest, which is revoked while its calls are under way.
KEYS = 8
KEY_EVERY_S = 2.0
# New lines among all calls, and what they cost on average. The room that a key has for its share of them is so little
# more than that share that keys are full before they are revoked.
NEW = 0.45
# Over the cap, or under a revoked key.
REFUSED = 0.05
AMOUNTS_CENTS = range(100, 900)
MEAN_CENTS = 500
ROOM = 1.1
# Lines that repeats are chosen from, and reads.
RECENT = 5_000
AGAIN_S = 0.5, 8.0

FAULT_EVERY_S = 0.25
RELEASE_EVERY_S = 2.0
FAULTS: list[tuple[int, Any]] = [
    (8, "drop_before"),
    (8, "drop_after"),
    (8, "reset"),
    (8, "reset_after"),
    (8, "half_body"),
    (8, "garbage"),
    (8, "decline"),
    (8, "rate_limited"),
    (8, "lock_timeout"),
    (8, "conflict409"),
    (8, {"slow_ms": 300}),
    (8, {"slow_after_ms": 300}),
    (3, {"slow_after_ms": UPSTREAM_TIMEOUT_MS + 1_000}),
    (3, "hold"),
    (3, "hold_after"),
    (2, "status500_after"),
    # Stripe stores these: their doubts stay.
    (1, "status500_before"),
    (1, "status424"),
]
# Beside every fifth of these, one that a read meets.
READ_FAULTS = 0.2
FAULTS_OF_READS = ["drop_before", "reset_after", "rate_limited", "half_body", "garbage", {"slow_after_ms": 300}]
# What the sidecar may answer to all of that.
EXPLAINED = {
    "200",
    "401 vault_key_revoked",
    "402 card_declined",
    "409 idempotency_key_in_use",
    "424 api_error",
    "429 lock_timeout",
    "429 rate_limit",
    "429 spend_cap_exceeded",
    "500 api_error",
    "502 outcome_unknown",
    "502 upstream_unreachable",
    "504 outcome_unknown",
    "504 upstream_unreachable",
}

SAMPLE_EVERY_S = 5.0
# The store's cache of 64 MB fills up first. From then on the last third of the run may take so much more than the
# first; a run that has fewer samples than these behind the warm-up is only held against the most.
WARM_UP_S = 150.0
JUDGED_LEAST = 18
MEMORY_MAX_MB = 192
MEMORY_GROWTH = 1.15
# Connections come in bursts when an answer is late; what is never given back is there at the quietest moment, too.
DESCRIPTORS_MAX = 5 * WORKERS
DESCRIPTORS_GROWTH = 16
LOAD_LEAST = 0.9
LATE_S = 1.0
END_TIMEOUT_S = 180.0
TOLD_MAX = 50


@dataclass
class Line:
    """A line of business: wanted once."""

    number: int
    amount: int
    charge: str | None = None
    # Known not to be executed: declined, or refused.
    ended: bool = False
    # Stripe repeats a stored 500 or 424.
    stuck: bool = False

    @property
    def customer(self) -> str:
        return f"cus_soak_{self.number}"

    @property
    def known(self) -> bool:
        return self.charge is not None or self.ended or self.stuck


@dataclass
class Key:
    id: str
    secret: str


@dataclass
class Sample:
    resident_mb: float
    descriptors: int


@dataclass
class Answer:
    status: int
    replayed: bool
    body: Any

    @property
    def code(self) -> str:
        error = self.body.get("error") if isinstance(self.body, dict) else None
        return str(error.get("code") or error.get("type")) if error else ""


@dataclass
class Soak:
    standin: Standin
    sidecar: Sidecar
    # Of each key, in cents.
    cap: int
    work: queue.Queue[Callable[[], None] | None] = field(default_factory=queue.Queue)
    lock: threading.Lock = field(default_factory=threading.Lock)
    collecting: threading.Lock = field(default_factory=threading.Lock)
    keys: list[Key] = field(default_factory=list)
    revoked: collections.deque[Key] = field(default_factory=lambda: collections.deque(maxlen=KEYS))
    # Ids of all there ever were.
    minted: list[str] = field(default_factory=list)
    executed: list[dict[str, Any]] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    recent: collections.deque[Line] = field(default_factory=lambda: collections.deque(maxlen=RECENT))
    # Lines without an outcome by when to ask again, the next one first.
    again: list[tuple[float, int, Line]] = field(default_factory=list)
    answers: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    violations: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    late: int = 0
    connection: threading.local = field(default_factory=threading.local)

    def violated(self, what: str) -> None:
        with self.lock:
            self.violations.append(what)

    # One request.

    def ask(self, method: str, path: str, bearer: str, form: dict[str, Any] | None = None, name: str = "") -> Answer:
        headers = {"Authorization": f"Bearer {bearer}"}
        if name:
            headers["Idempotency-Key"] = name
        if form is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        body = urllib.parse.urlencode(form) if form is not None else None
        kept: http.client.HTTPSConnection | None = getattr(self.connection, "kept", None)
        if kept is None:
            trust = strict_context(self.sidecar.ca)
            kept = http.client.HTTPSConnection("localhost", self.sidecar.port, timeout=ANSWER_TIMEOUT_S, context=trust)
            self.connection.kept = kept
        try:
            kept.request(method, path, body, headers)
            reply = kept.getresponse()
            told = decoded(reply.read())
        except BaseException:
            kept.close()
            self.connection.kept = None
            raise
        return Answer(reply.status, reply.headers.get("Idempotent-Replayed") == "true", told)

    def count(self, kind: str, answer: Answer) -> None:
        told = f"{answer.status} {answer.code}".strip()
        with self.lock:
            self.answers[kind, told] += 1
            if told not in EXPLAINED:
                self.violations.append(f"{kind}: nothing explains {answer}")

    # What is asked.

    def charge(self, line: Line, kind: str) -> None:
        with self.lock:
            key = random.choice(self.keys)
        form = {"amount": line.amount, "currency": "usd", "customer": line.customer, "source": "tok_visa"}
        answer = self.ask("POST", "/v1/charges", key.secret, form, f"soak:{line.number}")
        self.count(kind, answer)
        self.learn(line, answer)
        if not line.known:
            with self.lock:
                heapq.heappush(self.again, (time.monotonic() + random.uniform(*AGAIN_S), line.number, line))

    def learn(self, line: Line, answer: Answer) -> None:
        if answer.status == 200:
            charge = answer.body["id"] if isinstance(answer.body, dict) else ""
            if line.charge not in (None, charge):
                self.violated(f"{line.customer} was answered with {line.charge}, then with {charge}")
            line.charge, line.stuck = charge, False
        elif answer.status == 402:
            line.ended = True
        elif answer.status in (500, 424) and answer.replayed:
            line.stuck = line.charge is None

    def refused(self, number: int, key: Key, kind: str, amount: int, codes: list[str]) -> None:
        form = {"amount": amount, "currency": "usd", "customer": f"cus_refused_{number}", "source": "tok_visa"}
        answer = self.ask("POST", "/v1/charges", key.secret, form, f"refused:{number}")
        self.count(kind, answer)
        if answer.code not in codes:
            self.violated(f"a call {kind} was answered {answer}")

    def read(self, line: Line) -> None:
        with self.lock:
            key = random.choice(self.keys)
        self.count("read", self.ask("GET", f"/v1/charges/{line.charge}", key.secret))

    def mint(self) -> None:
        """A new key; the oldest is revoked once it is full of calls."""
        cap = str(Decimal(self.cap) / 100)
        endpoints = ["POST /v1/charges", "GET /v1/charges/{id}"]
        life = {"expires_in_seconds": 2 * 86_400, "total_usd_cap": cap, "requests_per_second": 1_000}
        made = self.sidecar.issue("soak", allowed_endpoints=endpoints, daily_usd_cap=cap, **life)
        with self.lock:
            self.minted.append(made["id"])
            self.keys.append(Key(made["id"], made["vault_key"]))
            oldest = self.keys.pop(0) if len(self.keys) > KEYS else None
        if oldest:
            self.sidecar.revoke(oldest.id)
            with self.lock:
                self.revoked.append(oldest)

    def next_call(self) -> Callable[[], None]:
        """What one more request is for."""
        rolled = random.random()
        with self.lock:
            due = bool(self.again) and self.again[0][0] <= time.monotonic()
            if rolled < 0.2 and due:
                return partial(self.charge, heapq.heappop(self.again)[2], "again")
            recent = random.choice(self.recent) if self.recent else None
            if recent and rolled < 0.2:
                return partial(self.charge, recent, "repeated")
            if recent and rolled < 0.5 and recent.charge:
                return partial(self.read, recent)
            number = len(self.lines)
            if rolled < 0.5 + REFUSED:
                number, key = int(rolled * 1e12), random.choice([*self.keys, *self.revoked])
                if key in self.revoked:
                    return partial(self.refused, number, key, "revoked", 100, ["vault_key_revoked"])
                # Meanwhile it may be revoked.
                codes = ["spend_cap_exceeded", "vault_key_revoked"]
                return partial(self.refused, number, key, "over the cap", self.cap + 1, codes)
            line = Line(number, random.choice(AMOUNTS_CENTS))
            self.lines.append(line)
            self.recent.append(line)
            return partial(self.charge, line, "new")

    def fault(self) -> None:
        weights = [weight for weight, _ in FAULTS]
        fault = random.choices([name for _, name in FAULTS], weights)[0]
        self.standin.fault(fault)
        if random.random() < READ_FAULTS:
            self.standin.fault(random.choice(FAULTS_OF_READS), path={"method": "GET", "prefix": "/v1/charges"})

    # The run.

    def worker(self) -> None:
        while (job := self.work.get()) is not None:
            try:
                job()
            except Exception as error:  # Whatever it is, nothing here may go wrong unseen.
                self.violated(f"a request failed: {error!r}")

    def run(self, seconds: float, rate: float) -> None:
        chores: list[tuple[float, Callable[[], None]]] = [
            (FAULT_EVERY_S, self.fault),
            (RELEASE_EVERY_S, self.standin.release),
            (KEY_EVERY_S, self.mint),
        ]
        due = [0.0] * len(chores)
        began = time.monotonic()
        sampled, told = -SAMPLE_EVERY_S, 0.0
        for number in range(int(seconds * rate)):
            scheduled = number / rate
            time.sleep(max(0.0, began + scheduled - time.monotonic()))
            passed = time.monotonic() - began
            self.late += passed - scheduled > LATE_S or self.work.qsize() > rate * LATE_S
            for at, (every, chore) in enumerate(chores):
                if passed >= due[at]:
                    due[at] = passed + every
                    self.work.put(chore)
            if passed - sampled >= SAMPLE_EVERY_S:
                sampled = passed
                self.sidecar.must_run()
                self.samples.append(sample(self.sidecar.pid))
                self.work.put(self.collect)
            if passed - told >= 60:
                told = passed
                print(f"{passed:6.0f} s  {self.progress()}", flush=True)
            self.work.put(self.next_call())

    def progress(self) -> str:
        last = self.samples[-1]
        with self.lock:
            asked, open_lines = sum(self.answers.values()), len(self.again)
        return (
            f"{asked} answers, {len(self.lines)} lines, {open_lines} without an outcome, {len(self.minted)} keys, "
            f"{last.resident_mb:.0f} MB, {last.descriptors} descriptors"
        )

    def start(self) -> list[threading.Thread]:
        for _ in range(KEYS):
            self.mint()
        workers = [threading.Thread(target=self.worker, daemon=True) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
        return workers

    def stop(self, workers: list[threading.Thread]) -> None:
        """Waits for what is under way."""
        for _ in workers:
            self.work.put(None)
        deadline = time.monotonic() + END_TIMEOUT_S
        while any(worker.is_alive() for worker in workers):
            # What a fault holds back would hold its worker, too.
            self.standin.release()
            time.sleep(0.2)
            if time.monotonic() > deadline:
                raise RigError("requests are still under way")

    def unknown(self) -> list[Line]:
        """Lines without an outcome. A declined call is sent again when it is made again, and may come to be in doubt then."""
        doubts = self.doubts()
        return [line for line in self.lines if not line.known or (line.customer in doubts and not line.stuck)]

    def end(self) -> None:
        """No new faults: every line is asked for until it has an outcome."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while (unknown := self.unknown()) and time.monotonic() < deadline:
            # What full keys have refused finds room.
            workers = self.start()
            for line in unknown:
                self.work.put(partial(self.charge, line, "at the end"))
            self.stop(workers)
        for line in unknown:
            self.violations.append(f"{line.customer} has no outcome")

    # What must be true.

    def check(self) -> None:
        self.collect()
        doubts, of_keys = self.books()
        stuck = {line.customer for line in self.lines if line.stuck}
        for customer in doubts.keys() - stuck:
            self.violations.append(f"nothing explains the doubt of {customer}")
        for hold in self.sidecar.pages("/admin/holds", state="sending"):
            self.violations.append(f"a hold is still being sent: {hold}")
        self.check_executed()
        self.check_keys(of_keys)
        spent, held = (sum(amounts) for amounts in zip(*of_keys.values()))
        executed = sum(row["amount"] for row in self.executed if row["customer"] not in doubts)
        if spent != executed:
            self.violations.append(f"{spent} cents are booked, and {executed} were executed")
        if held != sum(doubts.values()):
            self.violations.append(f"{held} cents are held, and {sum(doubts.values())} are in doubt")
        told = self.sidecar.verify_audit()
        if told["exit_code"] != 0:
            self.violations.append(f"the audit log is not whole: {told}")
        in_doubt = f"{len(doubts)} are in doubt, which Stripe repeats as a stored 500 or 424"
        print(f"{len(self.executed)} lines were executed and {spent / 100:.2f} USD are booked; {in_doubt}")
        print(f"the audit log is whole: {told.get('records')} records")

    def doubts(self) -> dict[str, int]:
        return {hold["customer"]: hold["amount"] for hold in self.sidecar.holds_in_doubt()}

    def books(self) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
        """Doubts, and what each key has spent and held, in cents, of one moment: recovery may end a doubt at any time."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while time.monotonic() < deadline:
            doubts, of_keys = self.doubts(), {}
            for key in self.minted:
                shown = self.ask("GET", f"/admin/vault_keys/{key}", self.sidecar.admin_key).body["spend"]["total"]
                of_keys[key] = (cents(shown["spent"]), cents(shown["held"]))
            if self.doubts() == doubts:
                return doubts, of_keys
        raise RigError("the doubts never stand still")

    def collect(self) -> None:
        """What was executed since the last time: an hour of it at once is too much for one answer."""
        with self.collecting:
            self.executed += self.standin.executed(since=self.executed[-1]["seq"] if self.executed else 0)

    def check_executed(self) -> None:
        """Each line once at most, at its amount, as it was answered."""
        wanted = {line.customer: line for line in self.lines}
        seen: set[str] = set()
        for row in self.executed:
            line = wanted.get(row["customer"])
            if line is None or row["amount"] != line.amount:
                self.violations.append(f"nobody wanted {row}")
            elif row["customer"] in seen:
                self.violations.append(f"{row['customer']} was charged twice")
            elif line.charge not in (None, row["object_id"]):
                self.violations.append(f"{row['customer']} was charged by {row['object_id']}, told of {line.charge}")
            seen.add(row["customer"])
        for line in self.lines:
            if line.charge is not None and line.customer not in seen:
                self.violations.append(f"{line.customer} was told of {line.charge}, which nobody executed")

    def check_keys(self, of_keys: dict[str, tuple[int, int]]) -> None:
        """Each key is within its cap, by its own word and by what was executed."""
        payers: dict[str, str] = {}
        for record in self.sidecar.pages("/audit", events="all", event="admitted", order="asc"):
            # Who is admitted first pays; the repeat of a doubt has a flag.
            if not record["flags"]:
                payers[record["customer"]] = record["key_id"]
        paid: collections.Counter[str] = collections.Counter()
        for row in self.executed:
            if row["customer"] not in payers:
                self.violations.append(f"{row} has no record")
            else:
                paid[payers[row["customer"]]] += row["amount"]
        for key, counted in of_keys.items():
            if sum(counted) > self.cap or paid[key] > self.cap:
                self.violations.append(f"{key} exceeds {self.cap} cents: {counted} counted, {paid[key]} executed")

    def check_load(self, calls: int) -> None:
        share = 1 - self.late / calls
        print(f"{share:.1%} of {calls} calls were made at their time")
        if share < LOAD_LEAST:
            self.violations.append(f"the load was not made: only {share:.1%} of it at its time")
        kinds = collections.Counter(kind for kind, _ in self.answers.elements())
        for kind, count in kinds.most_common():
            told = [(answer, n) for (of, answer), n in self.answers.most_common() if of == kind]
            print(f"  {kind:<13}{count:>8}  " + ", ".join(f"{answer}: {n}" for answer, n in told))

    def check_flat(self) -> None:
        most = max(one.resident_mb for one in self.samples), max(one.descriptors for one in self.samples)
        print(f"memory: {most[0]:.1f} MB at most; descriptors: {most[1]} at most")
        if most[0] > MEMORY_MAX_MB or most[1] > DESCRIPTORS_MAX:
            self.violations.append(f"more than {MEMORY_MAX_MB} MB, or than {DESCRIPTORS_MAX} descriptors")
        warm = self.samples[int(WARM_UP_S / SAMPLE_EVERY_S) :]
        if len(warm) < JUDGED_LEAST:
            print("too short to say whether they are flat")
            return
        third = len(warm) // 3
        thirds = warm[:third], warm[-third:]
        memory = [statistics.median(one.resident_mb for one in samples) for samples in thirds]
        files = [min(one.descriptors for one in samples) for samples in thirds]
        told = "{} in the first third once warm, {} in the last"
        print(f"memory, median: {told.format(*(round(of, 1) for of in memory))}")
        print(f"descriptors, least: {told.format(*files)}")
        if memory[1] > memory[0] * MEMORY_GROWTH:
            self.violations.append(f"memory grows: {told.format(*memory)}")
        if files[1] > files[0] + DESCRIPTORS_GROWTH:
            self.violations.append(f"descriptors grow: {told.format(*files)}")


def cents(dollars: str) -> int:
    return int(Decimal(dollars) * 100)


def sample(pid: int) -> Sample:
    status = Path(f"/proc/{pid}/status").read_text()
    kib = next(int(row.split()[1]) for row in status.splitlines() if row.startswith("VmRSS:"))
    return Sample(kib / 1024, len(os.listdir(f"/proc/{pid}/fd")))


def main() -> int:
    seconds, rate = float(os.environ.get("SOAK_SECONDS", "3600")), float(os.environ.get("SOAK_RPS", "200"))
    # So that its processes end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    settings = {"KEYBRAKE_UPSTREAM_TIMEOUT_MS": str(UPSTREAM_TIMEOUT_MS), "KEYBRAKE_LOG": "error"}
    with tempfile.TemporaryDirectory() as home, Standin(Path(home), STRIPE_LATENCY_MS) as standin:
        stripe = {"stripe_base": standin.url, "stripe_key": standin.secret_key}
        with Sidecar(Path(home), **stripe, settings=settings) as sidecar:
            soak = Soak(standin, sidecar, cap=int(rate * NEW * MEAN_CENTS * KEY_EVERY_S * ROOM))
            workers = soak.start()
            soak.run(seconds, rate)
            soak.stop(workers)
            soak.end()
            soak.check_load(int(seconds * rate))
            soak.check_flat()
            soak.check()
    for violation in soak.violations[:TOLD_MAX]:
        print(f"VIOLATED: {violation}")
    print(f"{len(soak.violations)} violations" if soak.violations else "nothing was violated")
    return 1 if soak.violations else 0


if __name__ == "__main__":
    sys.exit(main())
