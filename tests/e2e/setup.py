#!/usr/bin/env python3
"""Fetches and compiles the Kestra engines that the end-to-end tests run on, once, under .cache/ in the repository.

    setup.py                 all versions; prints for each a line of JSON: version, dialect, the command that starts it
    setup.py 1.3.31          one version only
    setup.py --released 2.0.0
                             the whole released jar and the released Python plugin instead, where Maven Central has them
    setup.py --rewrite-jars  writes the lists jars-*.txt anew, from what is resolved now

The engine is made of Kestra's released modules from Maven Central (`engine/pom.xml`), each pinned by its SHA-256. Needs
Python 3.9, Maven, and a JDK 25: JAVA_HOME, then `java` on the PATH, then /usr/lib/jvm. What is missing is said, and the
exit code is then 69.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sdk"))

from setup import CACHE, answer, check_python, once, run, say  # noqa: E402

ENGINE = HERE / "engine"
# The dialect that a version speaks: which of engine/src-* is compiled.
VERSIONS = {"1.3.31": "1.3", "2.0.0": "2.0"}
# Class files of 2.0 are for Java 25, and 1.3's own launcher demands it too.
JAVA_MIN = 25
MAVEN_PLUGIN = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1"
MAVEN_REPOSITORY = f"-Dmaven.repo.local={CACHE / 'maven'}"
PYTHON_PLUGIN = "io.kestra.plugin:plugin-script-python:1.9.8"
# Not there, as opposed to broken: what sysexits.h calls "service unavailable".
EXIT_MISSING = 69
JAVA_OPTIONS = ["-Xmx400m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
ARCHIVE = "engine.jsa"
MAIN = "keybrake.e2e.Engine"
ARCHIVE_TIMEOUT_S = 240


@dataclass(frozen=True)
class Engine:
    """The command lacks the data directory and the grace period of the worker."""

    version: str
    dialect: str
    command: list[str]


def engine(version: str) -> Engine:
    """The engine of this version, fetched and compiled now if it is not there."""
    dialect = VERSIONS[version]
    home = jdk()
    libraries = jars(version)
    sources = [*sorted((ENGINE / "src").rglob("*.java")), *sorted((ENGINE / f"src-{dialect}").rglob("*.java"))]
    resources = sorted(path for path in (ENGINE / "resources").rglob("*") if path.is_file())
    class_path = [str(jar) for jar in sorted(libraries.glob("*.jar"))]

    def command(target: Path, *options: str) -> list[str]:
        path = os.pathsep.join([str(target / "engine.jar"), *class_path])
        return [str(home / "bin" / "java"), *JAVA_OPTIONS, *options, "-cp", path, MAIN]

    def build(target: Path) -> None:
        say(f"compiling the engine of Kestra {version} into {target} (once)")
        classes = target / "classes"
        shutil.copytree(ENGINE / "resources", classes)
        flags = ["-proc:none", "-nowarn", "-encoding", "UTF-8", "-d", str(classes), "-cp", os.pathsep.join(class_path)]
        run([str(home / "bin" / "javac"), *flags, *map(str, sources)])
        # The archive of classes takes jars only.
        run([str(home / "bin" / "jar"), "--create", "--file", str(target / "engine.jar"), "-C", str(classes), "."])
        start_and_stop(command(target, f"-XX:ArchiveClassesAtExit={target / ARCHIVE}"), target)

    told = answer([str(home / "bin" / "java"), "-version"], dict(os.environ))
    target = once(f"engine-{version}", build, told, libraries.name, *sources, *resources)
    # The archive only saves time; with another JVM than the one that made it, it is not used. stdout is for answers.
    options = [f"-XX:SharedArchiveFile={target / ARCHIVE}", "-Xshare:auto", "-Xlog:disable", "-Xlog:all=error:stderr"]
    return Engine(version, dialect, command(target, *options))


def start_and_stop(command: list[str], target: Path) -> None:
    """Once, so that the JVM keeps the classes as it has them in memory: later starts are quicker."""
    data = target / "data"
    data.mkdir()
    log = target / "start.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*command, str(data), "1s"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
        late = threading.Timer(ARCHIVE_TIMEOUT_S, process.kill)
        late.start()
        with process:
            assert process.stdout is not None
            ready = process.stdout.readline()
            process.terminate()
            process.wait()
        late.cancel()
    if not ready or not (target / ARCHIVE).is_file():
        say(f"no archive of classes within {ARCHIVE_TIMEOUT_S} s, so each start takes longer; see {log}")
    shutil.rmtree(data)


def jars(version: str) -> Path:
    """The directory with exactly the jars that jars-*.txt names."""
    pins = ENGINE / f"jars-{version}.txt"

    def build(target: Path) -> None:
        resolve(version, target)
        wanted, found = pinned(pins), {jar.name: sha256(jar) for jar in target.glob("*.jar")}
        if wanted != found:
            wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            sys.exit(f"setup: not the jars of {pins}: {', '.join(wrong)}")

    return once(f"kestra-{version}", build, ENGINE / "pom.xml", pins)


def released(version: str) -> dict[str, str]:
    """Kestra as its makers start it. Not pinned: it was not to be had where the lists of jars were made."""

    def build(target: Path) -> None:
        check_maven()
        for artifact, folder in ((f"io.kestra:kestra:{version}", target), (PYTHON_PLUGIN, target / "plugins")):
            options = ["-Dmdep.useBaseVersion=true", f"-Dartifact={artifact}", f"-DoutputDirectory={folder}"]
            run(["mvn", "--batch-mode", "--quiet", MAVEN_REPOSITORY, f"{MAVEN_PLUGIN}:copy", *options], cwd=target)

    home = jdk()
    target = once(f"released-{version}", build, version, PYTHON_PLUGIN)
    jar = target / f"kestra-{version}.jar"
    return {"java": str(home / "bin" / "java"), "jar": str(jar), "plugins": str(target / "plugins")}


def check_maven() -> None:
    if not shutil.which("mvn"):
        missing("Maven, to fetch Kestra's released modules", "apt-get install maven")


def resolve(version: str, target: Path) -> None:
    check_maven()
    say(f"fetching Kestra {version} into {target} (once)")
    run([
        "mvn", "--batch-mode", "--quiet", "--file", str(ENGINE / "pom.xml"),
        f"-P{VERSIONS[version]}", f"-Dkestra={version}", MAVEN_REPOSITORY,
        f"{MAVEN_PLUGIN}:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={target}",
    ])  # fmt: skip


def pinned(pins: Path) -> dict[str, str]:
    lines = [line.split() for line in pins.read_text().splitlines() if line and not line.startswith("#")]
    return {name: digest for digest, name in lines}


def rewrite(version: str) -> None:
    target = CACHE / f"kestra-{version}-new"
    shutil.rmtree(target, ignore_errors=True)
    resolve(version, target)
    lines = [f"{sha256(jar)}  {jar.name}\n" for jar in sorted(target.glob("*.jar"))]
    (ENGINE / f"jars-{version}.txt").write_text("".join(lines))
    shutil.rmtree(target)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def jdk() -> Path:
    """The home of a JDK that is new enough and has a compiler."""
    named = os.environ.get("JAVA_HOME")
    found = shutil.which("java")
    homes = [Path(named)] if named else []
    homes += [Path(found).resolve().parents[1]] if found else []
    homes += sorted(Path("/usr/lib/jvm").glob("*25*"))
    for home in homes:
        if (home / "bin" / "javac").is_file() and java_version(home) >= JAVA_MIN:
            return home
    missing(
        f"a JDK {JAVA_MIN} or later (JAVA_HOME, `java` on the PATH, or in /usr/lib/jvm)",
        "apt-get install openjdk-25-jdk-headless, where the distribution has it, or any build of OpenJDK 25",
    )


def java_version(home: Path) -> int:
    told = re.search(r'version "(\d+)', answer([str(home / "bin" / "java"), "-version"], dict(os.environ)))
    return int(told[1]) if told else 0


def missing(what: str, how: str) -> NoReturn:
    say(f"the Kestra engine needs {what}, and there is none.\n{how}")
    sys.exit(EXIT_MISSING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", nargs="*", help=f"of {', '.join(VERSIONS)}; all without one")
    parser.add_argument("--released", action="store_true", help="the whole released jar instead")
    parser.add_argument("--rewrite-jars", action="store_true", help="write the lists of jars anew")
    arguments = parser.parse_args()
    check_python()
    for version in arguments.version or VERSIONS:
        if version not in VERSIONS:
            parser.error(f"not one of {', '.join(VERSIONS)}: {version}")
        if arguments.rewrite_jars:
            rewrite(version)
        print(json.dumps(released(version) if arguments.released else asdict(engine(version))))


if __name__ == "__main__":
    main()
