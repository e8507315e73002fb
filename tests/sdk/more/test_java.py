"""stripe-java against a sidecar: its base URL takes a path, and its CA stands in a trust store."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("scenarios")

import setup  # noqa: E402
from conftest import World  # noqa: E402
from scenarios import Program, Scenarios  # noqa: E402

KEYTOOL_TIMEOUT_S = 60


def trust_store(ca: Path, store: Path) -> None:
    """The command of the README."""
    keytool = shutil.which("keytool")
    assert keytool, "keytool comes with Java"
    options = ["-noprompt", "-storetype", "PKCS12", "-storepass", "changeit"]
    command = [keytool, "-importcert", "-alias", "keybrake", "-file", str(ca), "-keystore", str(store), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=KEYTOOL_TIMEOUT_S)


@pytest.fixture(scope="session")
def program(world: World, tmp_path_factory: pytest.TempPathFactory) -> Program:
    home = setup.java_home()
    store = tmp_path_factory.mktemp("java") / "trust.p12"
    trust_store(world.sidecar.ca, store)
    classpath = f"{home / 'classes'}:{home / 'jars'}/*"
    # By itself the JVM compiles for a server that runs for days; a task ends after a second.
    command = [shutil.which("java") or "java", "-XX:TieredStopAtLevel=1", "-cp", classpath, "Charge"]
    trusts = f"-Djavax.net.ssl.trustStore={store} -Djavax.net.ssl.trustStorePassword=changeit"
    return Program(command, trusts={"JDK_JAVA_OPTIONS": trusts}, trusts_nobody={"JDK_JAVA_OPTIONS": ""})


class TestJava(Scenarios):
    invalid = "InvalidRequestException"
    too_much = "RateLimitException"

    def is_connection_error(self, told: dict[str, Any]) -> bool:
        return told["type"] == "ApiConnectionException"
