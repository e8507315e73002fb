"""JSON over HTTP, with the verification of certificates as strict as Python 3.13 has it."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

TIMEOUT_S = 15.0


class Refused(Exception):
    """An answer that is not 2xx."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status
        self.body = body

    @property
    def error(self) -> dict[str, Any]:
        return self.body.get("error", {}) if isinstance(self.body, dict) else {}


def strict_context(ca: Path) -> ssl.SSLContext:
    """Trusts this authority only, and verifies as strictly as Python 3.13 does by itself."""
    context = ssl.create_default_context(cafile=str(ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


def call(
    method: str,
    url: str,
    body: Any = None,
    *,
    bearer: str | None = None,
    context: ssl.SSLContext | None = None,
) -> Any:
    headers = {"Accept": "application/json"}
    if bearer is not None:
        headers["Authorization"] = f"Bearer {bearer}"
    data = None
    if body is not None:
        headers["Content-Type"] = "application/json"
        data = json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if context is not None:
        handlers.append(urllib.request.HTTPSHandler(context=context))
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT_S) as answer:
            return decoded(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            raise Refused(error.code, decoded(error.read())) from None


def decoded(data: bytes) -> Any:
    try:
        return json.loads(data) if data else None
    except ValueError:
        return data.decode(errors="replace")


def query(url: str, **filters: Any) -> str:
    """`metadata[flow]` and its like are passed as `**{"metadata[flow]": …}`."""
    given = {name: value for name, value in filters.items() if value is not None}
    return f"{url}?{urllib.parse.urlencode(given)}" if given else url
