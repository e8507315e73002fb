"""The official chart as Helm renders it, and what Kubernetes says of the result."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import yaml

REPO = Path(__file__).resolve().parents[2]
HELM = REPO / "kestra" / "helm"
BASE = "values-keybrake.yaml"
PERSISTENT = "values-keybrake-persistent.yaml"
POSTGRES = "values-keybrake-postgres.yaml"
# The first one with sidecars that are init containers, and the newest there is a schema for.
KUBERNETES = ("1.29", kubernetes_validate.latest_version())
# The first one with a StatefulSet that names no service.
KUBERNETES_OF_A_FLEET = ("1.33", kubernetes_validate.latest_version())
RELEASE = "kestra"
# What the chart insists on.
YOURS = {
    "configurations": {"application": {"kestra": {"queue": {"type": "postgres"}, "repository": {"type": "postgres"}}}}
}

Manifest = dict[str, Any]


def charts() -> list[Path]:
    """The unpacked charts of KESTRA_CHARTS."""
    return [Path(part) for part in os.environ.get("KESTRA_CHARTS", "").split(os.pathsep) if part]


def values(*files: str) -> Manifest:
    """Values of ours on top of a user's, merged as `helm -f … -f …` does."""
    merged = copy.deepcopy(YOURS)
    for name in files:
        merge(merged, yaml.safe_load((HELM / name).read_text()))
    return merged


def merge(into: Manifest, more: Manifest) -> None:
    """Maps are merged, anything else is replaced."""
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            merge(into[name], value)
        else:
            # Two places of a file may be one object, by an anchor.
            into[name] = copy.deepcopy(value)


@dataclass
class Rendered:
    """All manifests of a release."""

    manifests: list[Manifest]

    def workloads(self) -> dict[str, Manifest]:
        """The pods' specs by the name of what makes them."""
        kinds = ("Deployment", "StatefulSet")
        found = [manifest for manifest in self.manifests if manifest["kind"] in kinds]
        return {manifest["metadata"]["name"]: manifest["spec"]["template"]["spec"] for manifest in found}

    def named(self, kind: str, name: str) -> Manifest:
        (found,) = [one for one in self.manifests if one["kind"] == kind and one["metadata"]["name"] == name]
        return found

    def check(self, versions: tuple[str, ...] = KUBERNETES) -> None:
        check(self.manifests, versions)


def render(chart: Path, given: Manifest) -> Rendered:
    with helm.Chart.load(str(chart)) as loaded:
        texts = loaded.render(given, name=RELEASE).values()
    documents = [document for text in texts for document in yaml.safe_load_all(text)]
    return Rendered([document for document in documents if document])


def check(manifests: list[Manifest], versions: tuple[str, ...] = KUBERNETES) -> None:
    """Unknown fields are errors, which an API server only warns of."""
    for manifest in manifests:
        for version in versions:
            kubernetes_validate.validate(manifest, version, strict=True)


def plain(name: str) -> list[Manifest]:
    """A file of manifests that is no part of the chart."""
    return list(yaml.safe_load_all((HELM / name).read_text()))


def one(named: list[Manifest], name: str) -> Manifest:
    (found,) = [entry for entry in named if entry["name"] == name]
    return found
