"""What a charge task in any language has to meet, over TLS with verification on, each attempt in a fresh process."""

from __future__ import annotations

import json
import subprocess
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from conftest import World
from rig.process import clean_environment
from test_python import WAYS_OUT

ATTEMPTS = 2
TASK_TIMEOUT_S = 60


@dataclass(frozen=True)
class Program:
    """A task that is built, and how it is told whom to trust."""

    command: list[str]
    trusts: dict[str, str]
    trusts_nobody: dict[str, str]

    def charge(
        self, world: World, customer: str, vault_key: str, amount: int, key: str = "", trusting: bool = True
    ) -> dict[str, Any]:
        """One attempt; what the task tells of the charge or of the SDK's error."""
        given = {
            "KEYBRAKE_URL": world.sidecar.url,
            "STRIPE_SECRET_KEY": vault_key,
            "CUSTOMER": customer,
            "AMOUNT_CENTS": str(amount),
            "IDEMPOTENCY_KEY": key,
            **(self.trusts if trusting else self.trusts_nobody),
        }
        done = subprocess.run(
            self.command, env=clean_environment(given), capture_output=True, text=True, timeout=TASK_TIMEOUT_S
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


class Scenarios(ABC):
    """The tests; what they need of a language is told by a subclass, which also has a fixture `program`."""

    # How the SDK shows a 400 and a 429.
    invalid: str
    too_much: str

    @abstractmethod
    def is_connection_error(self, told: dict[str, Any]) -> bool:
        """Whether the SDK says that it got no answer."""

    def test_a_charge_is_made_and_its_retry_is_a_replay(
        self, world: World, customer: str, program: Program
    ) -> None:
        def attempt() -> dict[str, Any]:
            vault_key = world.sidecar.issue("task")["vault_key"]
            return program.charge(world, customer, vault_key, 2999, f"{customer}:2026-07")

        first = attempt()
        assert first["paid"] is True and first["replayed"] is None, first
        assert attempt() == {**first, "replayed": "true"}
        [arrived] = world.arrived(customer)
        assert arrived["headers"]["idempotency-key"] == f"{customer}:2026-07"
        assert [money["amount"] for money in world.standin.executed(customer)] == [2999]

    def test_the_cap_is_one_request_and_no_retry(self, world: World, customer: str, program: Program) -> None:
        key = world.sidecar.issue("task-cap", daily_usd_cap="10.00")
        with world.refuses("spend_cap_exceeded", requests=1):
            refused = program.charge(world, customer, key["vault_key"], 1001, f"{customer}-1")
        assert (refused["type"], refused["code"]) == (self.too_much, "spend_cap_exceeded"), refused
        assert refused["status"] == 429
        assert refused["message"].startswith("Spend cap exceeded")
        assert not world.arrived(customer)

    def test_a_random_key_is_refused_and_told_both_ways_out(
        self, world: World, customer: str, program: Program
    ) -> None:
        key = world.sidecar.issue("task-random")
        with world.refuses("idempotency_key_required", requests=1):
            refused = program.charge(world, customer, key["vault_key"], 2999)
        assert (refused["type"], refused["code"]) == (self.invalid, "idempotency_key_required"), refused
        assert all(words in refused["message"] for words in WAYS_OUT), refused["message"]
        assert not world.arrived(customer)

    def test_content_mode_makes_two_runs_one_charge(self, world: World, customer: str, program: Program) -> None:
        fields = {"idempotency": "content", "idempotency_scope": "billing:2026-07"}
        told = [
            program.charge(world, customer, world.sidecar.issue("task-content", **fields)["vault_key"], 2999)
            for _ in range(ATTEMPTS)
        ]
        assert [answer["replayed"] for answer in told] == [None, "true"]
        assert len({answer["id"] for answer in told}) == 1
        assert len(world.standin.executed(customer)) == 1

    def test_a_certificate_that_nobody_vouches_for_is_refused(
        self, world: World, customer: str, program: Program
    ) -> None:
        vault_key = world.sidecar.issue("task-ca")["vault_key"]
        told = program.charge(world, customer, vault_key, 2999, f"{customer}-1", trusting=False)
        assert self.is_connection_error(told), told
        assert "certificate" in told["message"] or "certification" in told["message"], told
        assert not world.arrived(customer)
