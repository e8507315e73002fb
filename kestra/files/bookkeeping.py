"""What your flow does after a charge: replace it by a write to your own database.

It runs after the money moved, so it is where a task fails and is run again from its first line.
"""


def record(line_id: str, charge_id: str) -> None:
    print(f"{line_id} {charge_id}", flush=True)
