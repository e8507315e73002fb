"""That the engine under the end-to-end tests is a Kestra: what flows use works, and workers are lost as elsewhere.

One engine for each version, one after the other. Those tests that end it come last.
"""

from __future__ import annotations

import base64
import itertools
import secrets
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "py"))

from rig.engine import EmbeddedKestra, Execution, KestraRefused  # noqa: E402
from rig.process import wait_until, within  # noqa: E402

TEST_TIMEOUT_S = 420
# The engine starts, notices that a worker is lost and gives its task out again; on a busy machine all of that is slow.
RESUBMIT_TIMEOUT_S = 120.0
FIRES_TIMEOUT_S = 60.0
NAMESPACE = "keybrake.engine"
GRACE_S = 2.0

# The place of a task is marked by TASK: a Python script on the Process runner.
TASK = """\
type: io.kestra.plugin.scripts.python.Script
    taskRunner: {type: io.kestra.plugin.core.runner.Process}"""


@pytest.fixture(scope="session", params=["1.3.31", "2.0.0"])
def kestra(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedKestra]:
    workdir = tmp_path_factory.mktemp("kestra")
    environment = {
        "ENV_WORKDIR": str(workdir),
        "SECRET_TOKEN": base64.b64encode(b"a secret").decode(),
    }
    with EmbeddedKestra(request.param, workdir, environment, grace_s=GRACE_S) as kestra:
        yield kestra


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    with within(TEST_TIMEOUT_S):
        yield


def load(kestra: EmbeddedKestra, source: str) -> str:
    """Loads a flow under an id of its own. TASK stands for a Python script on the Process runner."""
    name = f"flow-{secrets.token_hex(4)}"
    kestra.load(f"id: {name}\nnamespace: {NAMESPACE}\n{textwrap.dedent(source).replace('TASK', TASK)}")
    return name


def run(kestra: EmbeddedKestra, source: str, inputs: dict[str, Any] | None = None, **labels: str) -> Execution:
    named = {name.replace("_", "."): value for name, value in labels.items()}
    return kestra.wait(kestra.run(NAMESPACE, load(kestra, source), inputs, named))


def variables(execution: Execution, task: str) -> dict[str, Any]:
    return execution.runs_of(task)[-1].outputs["vars"]


def test_wrong_flows_are_refused(kestra: EmbeddedKestra) -> None:
    head = f"id: wrong\nnamespace: {NAMESPACE}\n"
    script = "  - id: a\n    type: io.kestra.plugin.scripts.python.Script\n"
    assert "script: must not be null" in kestra.validate(f"{head}tasks:\n{script}")[0]
    unknown = kestra.validate(f"{head}concurrencyLimit: 1\ntasks:\n{script}    script: pass\n")
    assert 'Unrecognized field "concurrencyLimit"' in unknown[0]
    unknown = kestra.validate(f"{head}tasks:\n{script}    script: pass\n    scirpt: pass\n")
    assert 'Unrecognized field "scirpt"' in unknown[0]
    loops = {
        name: kestra.validate(
            f"{head}tasks:\n  - id: each\n    type: io.kestra.plugin.core.flow.{name}\n    values: [1]\n"
            f"    tasks: [{{id: a, type: io.kestra.plugin.core.log.Log, message: a}}]\n"
        )
        for name in ("ForEach", "Loop")
    }
    assert bool(loops["ForEach"]) == (kestra.dialect == "2.0")
    assert bool(loops["Loop"]) == (kestra.dialect == "1.3")
    with pytest.raises(KestraRefused, match="must not be null"):
        kestra.load(f"{head}tasks:\n{script}")


def test_a_script_has_all_that_flows_give_it(kestra: EmbeddedKestra) -> None:
    kestra.put_file(NAMESPACE, "prices.py", b"PRICE = 700\n")
    ended = run(
        kestra,
        """
        inputs:
          - {id: period, type: STRING}
          - {id: book, type: FILE}
        outputs:
          - {id: total, type: INT, value: "{{ outputs.read.vars.total }}"}
        tasks:
          - id: write
            TASK
            namespaceFiles: {enabled: true, include: [prices.py]}
            inputFiles: {book.txt: "{{ inputs.book }}"}
            outputFiles: [bill.txt]
            env:
              PERIOD: "{{ inputs.period }}"
              TOKEN: "{{ secret('TOKEN') }}"
              WORK: "{{ envs.workdir }}"
              RUN: "{{ labels.system.correlationId }}"
            script: |
              import json, os
              import prices
              print("the book says", open("book.txt").read())
              open("bill.txt", "w").write(str(prices.PRICE + len(open("book.txt").read())))
              told = {name: os.environ[name] for name in ("PERIOD", "TOKEN", "WORK", "RUN")}
              print('::' + json.dumps({"outputs": told}) + '::')
          - id: read
            TASK
            inputFiles: {bill.txt: "{{ outputs.write.outputFiles['bill.txt'] }}"}
            script: |
              print('::{"outputs": {"total": %s}}::' % open("bill.txt").read())
        """,
        {"period": "2026-07", "book": b"a {{ 6 * 7 }} book"},
        system_correlationId="run-1",
        team="billing",
    )
    said = kestra.logs(ended.id)
    assert ended.state == "SUCCESS", said
    assert {"team": "billing", "system.correlationId": "run-1"}.items() <= ended.labels.items()
    assert ended.original_id == ended.id
    told = variables(ended, "write")
    workdir = str(kestra.log.parent)
    assert told == {"PERIOD": "2026-07", "TOKEN": "a secret", "WORK": workdir, "RUN": "run-1"}
    assert variables(ended, "read") == {"total": 718}
    assert ended.outputs == {"total": 718}
    assert "the book says a {{ 6 * 7 }} book" in said


def test_dependencies_are_not_passed_over(kestra: EmbeddedKestra) -> None:
    ended = run(
        kestra,
        """
        tasks:
          - id: a
            TASK
            dependencies: [stripe]
            script: pass
        """,
    )
    assert ended.state == "FAILED"
    assert "installs no `dependencies`: [stripe]" in kestra.logs(ended.id)


# Fails on the first attempt.
FLAKY = """
        tasks:
          - id: flaky
            TASK
            RETRY
            env: {ATTEMPT: "{{ taskrun.attemptsCount }}", RUN: "{{ labels.system.correlationId }}"}
            script: |
              import os
              print('::{"outputs": {"run": "%s"}}::' % os.environ["RUN"])
              raise SystemExit(0 if os.environ["ATTEMPT"] == "1" else 3)
        """


def test_a_retry_is_an_attempt_of_the_same_task_run(kestra: EmbeddedKestra) -> None:
    ended = run(kestra, FLAKY.replace("RETRY", "retry: {type: constant, interval: PT1S, maxAttempts: 3}"))
    assert ended.state == "SUCCESS", kestra.logs(ended.id)
    (flaky,) = ended.runs_of("flaky")
    assert flaky.attempts == ["FAILED", "SUCCESS"]


def test_restart_repeats_what_failed_and_replay_is_a_new_execution(kestra: EmbeddedKestra) -> None:
    failed = run(kestra, FLAKY.replace("RETRY", "timeout: PT1M"))
    assert failed.state == "FAILED"
    kestra.restart(failed.id)
    ended = kestra.wait(failed.id)
    assert ended.state == "SUCCESS", kestra.logs(ended.id)
    (flaky,) = ended.runs_of("flaky")
    assert (flaky.id, flaky.attempts) == (failed.runs_of("flaky")[0].id, ["FAILED", "SUCCESS"])
    with pytest.raises(KestraRefused):
        kestra.restart(ended.id)

    again = kestra.wait(kestra.replay(ended.id))
    assert again.id != ended.id
    assert (again.original_id, again.runs_of("flaky")[0].attempts) == (ended.id, ["FAILED"])
    assert variables(again, "flaky") == {"run": ended.id}
    from_task = kestra.wait(kestra.replay(again.id, again.runs_of("flaky")[0].id))
    assert (from_task.original_id, from_task.runs_of("flaky")[0].attempts) == (ended.id, ["FAILED", "SUCCESS"])


def test_a_loop_runs_its_tasks_for_each_value(kestra: EmbeddedKestra) -> None:
    loop, value = ("Loop", "item.value") if kestra.dialect == "2.0" else ("ForEach", "taskrun.value")
    ended = run(
        kestra,
        """
        tasks:
          - id: each
            type: io.kestra.plugin.core.flow.LOOP
            values: [{"line": "l1"}, {"line": "l2"}, {"line": "l3"}]
            concurrencyLimit: 3
            tasks:
              - id: line
                type: io.kestra.plugin.scripts.python.Script
                taskRunner: {type: io.kestra.plugin.core.runner.Process}
                env: {LINE: "{{ fromJson(VALUE).line }}"}
                script: |
                  import os
                  print('::{"outputs": {"line": "%s"}}::' % os.environ["LINE"])
        """.replace("LOOP", loop).replace("VALUE", value),
    )
    assert ended.state == "SUCCESS", kestra.logs(ended.id)
    assert sorted(run.outputs["vars"]["line"] for run in ended.runs_of("line")) == ["l1", "l2", "l3"]
    assert [execution.id for execution in kestra.executions(NAMESPACE, ended.flow)] == [ended.id]


def test_a_subflow_belongs_to_the_run_of_its_parent(kestra: EmbeddedKestra) -> None:
    child = load(
        kestra,
        """
        tasks:
          - {id: a, type: io.kestra.plugin.core.log.Log, message: "{{ labels.system.correlationId }}"}
        """,
    )
    parent = run(
        kestra,
        f"""
        tasks:
          - id: call
            type: io.kestra.plugin.core.flow.Subflow
            namespace: {NAMESPACE}
            flowId: {child}
            wait: true
            transmitFailed: true
        """,
    )
    assert parent.state == "SUCCESS", kestra.logs(parent.id)
    (called,) = kestra.executions(NAMESPACE, child)
    assert called.labels["system.correlationId"] == parent.id
    assert called.original_id == called.id != parent.id


def test_a_webhook_starts_an_execution_with_its_body(kestra: EmbeddedKestra) -> None:
    flow = load(
        kestra,
        """
        outputs:
          - {id: event, type: STRING, value: "{{ trigger.body.event }}"}
        tasks:
          - {id: a, type: io.kestra.plugin.core.log.Log, message: "{{ trigger.body.event }}"}
        triggers:
          - {id: hook, type: io.kestra.plugin.core.trigger.Webhook, key: "{{ secret('TOKEN') }}"}
        """,
    )
    started = kestra.webhook(NAMESPACE, flow, "a secret", {"event": "evt_1"})
    assert kestra.wait(started).outputs == {"event": "evt_1"}
    with pytest.raises(KestraRefused):
        kestra.webhook(NAMESPACE, flow, "another secret", {"event": "evt_2"})
    assert [execution.id for execution in kestra.executions(NAMESPACE, flow)] == [started]


def test_a_schedule_fires_by_itself_until_it_is_disabled(kestra: EmbeddedKestra) -> None:
    source = """\
id: {flow}
namespace: {namespace}
description: {revision}
tasks:
  - {{id: a, type: io.kestra.plugin.core.log.Log, message: "{{{{ trigger.date }}}}"}}
triggers:
  - id: tick
    type: io.kestra.plugin.core.trigger.Schedule
    cron: "* * * * * *"
    withSeconds: true
    recoverMissedSchedules: NONE
    disabled: {disabled}
"""
    flow = f"flow-{secrets.token_hex(4)}"
    revisions = itertools.count()

    def revise(disabled: str) -> None:
        kestra.load(source.format(flow=flow, namespace=NAMESPACE, disabled=disabled, revision=next(revisions)))

    revise("false")
    wait_until("the schedule fires twice", lambda: len(kestra.executions(NAMESPACE, flow)) >= 2, FIRES_TIMEOUT_S)

    def quiet() -> bool:
        """No tick in two seconds, of which each had one. Kestra 2.0.0 was once seen to go on after one revision."""
        revise("true")
        before = len(kestra.executions(NAMESPACE, flow))
        time.sleep(2.0)
        return len(kestra.executions(NAMESPACE, flow)) == before

    wait_until("the schedule is quiet", quiet, FIRES_TIMEOUT_S)
    fired = [kestra.wait(execution.id) for execution in kestra.executions(NAMESPACE, flow)]
    assert {execution.state for execution in fired} == {"SUCCESS"}


# Says when it runs, and ends when it is told to.
SLOW = """
        tasks:
          - id: slow
            TASK
            env: {WORK: "{{ envs.workdir }}", RUN: "{{ execution.id }}", ATTEMPT: "{{ taskrun.attemptsCount }}"}
            script: |
              import os, pathlib, time
              here = pathlib.Path(os.environ["WORK"], os.environ["RUN"])
              here.with_suffix("." + os.environ["ATTEMPT"]).touch()
              for _ in range(3000):
                  if here.with_suffix(".go").exists():
                      raise SystemExit(0)
                  time.sleep(0.1)
              raise SystemExit(4)
        """


class Slow:
    """An execution whose script waits."""

    def __init__(self, kestra: EmbeddedKestra) -> None:
        self._kestra = kestra
        self.id = kestra.run(NAMESPACE, load(kestra, SLOW))
        self._work = kestra.log.parent
        self.runs(0)

    def runs(self, attempt: int) -> None:
        mark = self._work / f"{self.id}.{attempt}"
        wait_until(f"attempt {attempt} runs", mark.exists, RESUBMIT_TIMEOUT_S)

    def finish(self) -> Execution:
        (self._work / f"{self.id}.go").touch()
        return self._kestra.wait(self.id)


def test_kill_ends_the_script(kestra: EmbeddedKestra) -> None:
    slow = Slow(kestra)
    assert kestra.scripts()
    kestra.kill(slow.id)
    assert kestra.wait(slow.id).state == "KILLED"
    wait_until("the script is gone", lambda: not kestra.scripts())


def test_a_crash_leaves_the_script_and_starts_it_a_second_time(kestra: EmbeddedKestra) -> None:
    slow = Slow(kestra)
    first = set(kestra.scripts())
    kestra.crash()
    kestra.start()
    slow.runs(1)
    assert first and first < set(kestra.scripts())
    ended = slow.finish()
    assert ended.state == "SUCCESS", kestra.logs(ended.id)
    (task,) = ended.runs_of("slow")
    assert task.attempts == ["RESUBMITTED", "SUCCESS"]


def test_a_stop_ends_the_script_when_the_grace_is_over_and_starts_it_again(kestra: EmbeddedKestra) -> None:
    slow = Slow(kestra)
    kestra.stop()
    assert kestra.scripts() == []
    kestra.start()
    slow.runs(1)
    ended = slow.finish()
    assert ended.state == "SUCCESS", kestra.logs(ended.id)
    (task,) = ended.runs_of("slow")
    assert task.attempts[-1] == "SUCCESS" and len(task.attempts) == 2


def test_the_engine_ends_with_who_started_it_and_takes_its_scripts_along(kestra: EmbeddedKestra) -> None:
    Slow(kestra)
    kestra.hang_up()
    wait_until("the scripts are gone", lambda: not kestra.scripts())
