"""What happens after a charge, as the situation says: {"fail_first": n, "sleep_first": n, "sleep_s": s} for each line."""

import json
import os
import sys
import time
from pathlib import Path


def record(line_id: str, charge_id: str) -> None:
    print(f"{line_id} {charge_id}", flush=True)
    directory = Path(os.environ["E2E_DIR"])
    plan = directory / f"{line_id}.json"
    if not plan.exists():
        return
    told = json.loads(plan.read_text())
    attempt = _attempt(directory, line_id)
    print(f"attempt {attempt} of {line_id}", file=sys.stderr, flush=True)
    if attempt <= told.get("sleep_first", 0):
        time.sleep(told["sleep_s"])
    if attempt <= told.get("fail_first", 0):
        raise ConnectionError("the database is down")


def _attempt(directory: Path, line_id: str) -> int:
    """Which one this is, over all processes that run it."""
    attempt = 1
    while True:
        try:
            # Made by one of them only.
            (directory / f"{line_id}.{attempt}").open("x").write(str(os.getpid()))
            return attempt
        except FileExistsError:
            attempt += 1
