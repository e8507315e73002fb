"""The proxy that one would write in an afternoon: FastAPI, httpx, and a row in SQLite for each call.

It looks the caller's key up, compares its cap with what is spent, swaps the real key in, forwards, and writes what
came of it. No reserve before the call, no memory of calls, no doubt, no chain: what the sidecar is measured beside does less.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import asynccontextmanager
from typing import AsyncIterator
from urllib.parse import parse_qs

import httpx
from fastapi import FastAPI, HTTPException, Request, Response

UPSTREAM = os.environ["UPSTREAM"]
STRIPE_KEY = os.environ["STRIPE_KEY"]
UPSTREAM_TIMEOUT_S = 30.0
CAP_MINOR = 90_000_000_000
SCHEMA = """
CREATE TABLE vault_keys (vault_key TEXT PRIMARY KEY, cap INTEGER NOT NULL, spent INTEGER NOT NULL);
CREATE TABLE log (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, vault_key TEXT NOT NULL, method TEXT NOT NULL, path TEXT NOT NULL,
    amount INTEGER NOT NULL, status INTEGER NOT NULL, duration_ms REAL NOT NULL
);
"""
FORWARDED = ("content-type", "idempotency-key", "stripe-version")

# One event loop, so one connection; a commit is on the disk when it returns.
database = sqlite3.connect(os.environ["DATABASE"])
database.executescript(SCHEMA)
# The load's one bearer, which stands for a key that was minted.
database.execute("INSERT INTO vault_keys VALUES (?, ?, 0)", (STRIPE_KEY, CAP_MINOR))
database.commit()
upstream = httpx.AsyncClient(
    base_url=UPSTREAM, timeout=UPSTREAM_TIMEOUT_S, limits=httpx.Limits(max_keepalive_connections=64), trust_env=False
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield
    await upstream.aclose()
    database.close()


app = FastAPI(lifespan=lifespan)


@app.api_route("/{path:path}", methods=["GET", "POST"])
async def forward(path: str, request: Request) -> Response:
    began = time.monotonic()
    vault_key = request.headers.get("authorization", "").removeprefix("Bearer ")
    row = database.execute("SELECT cap, spent FROM vault_keys WHERE vault_key = ?", (vault_key,)).fetchone()
    if row is None:
        raise HTTPException(401, "vault_key_invalid")
    body = await request.body()
    amount = int(parse_qs(body.decode()).get("amount", ["0"])[0])
    cap, spent = row
    if spent + amount > cap:
        raise HTTPException(429, "spend_cap_exceeded")
    headers = {name: request.headers[name] for name in FORWARDED if name in request.headers}
    answer = await upstream.request(
        request.method,
        f"/{path}",
        params=request.query_params,
        content=body,
        headers={**headers, "authorization": f"Bearer {STRIPE_KEY}"},
    )
    duration_ms = (time.monotonic() - began) * 1_000
    entry = (time.time(), vault_key, request.method, path, amount, answer.status_code, duration_ms)
    database.execute(
        "INSERT INTO log (at, vault_key, method, path, amount, status, duration_ms) VALUES (?, ?, ?, ?, ?, ?, ?)", entry
    )
    if amount and answer.status_code == httpx.codes.OK:
        database.execute("UPDATE vault_keys SET spent = spent + ? WHERE vault_key = ?", (amount, vault_key))
    database.commit()
    return Response(answer.content, answer.status_code, {"content-type": answer.headers["content-type"]})
