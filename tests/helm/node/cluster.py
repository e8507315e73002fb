"""A Kubernetes of one node on this machine: etcd, the control plane, containerd and a kubelet as processes of ours.

Needs root and Debian's containerd, runc, containernetworking-plugins, etcd-server and busybox-static. Everything
listens on loopback and writes under one directory, but for the cgroups, the bridge, and in /var/lib/kubelet and
/var/log/containers what a kubelet cannot be told to put elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

from rig.process import Child, RigError, free_port, wait_until

START_TIMEOUT_S = 120.0
POD_TIMEOUT_S = 180.0
COMMAND_TIMEOUT_S = 60.0
BRIDGE = "kb-test0"
PODS = "10.88.77.0/24"
# This machine, as pods see it.
GATEWAY = "10.88.77.1"
SERVICES = "10.88.78.0/24"
PAUSE = "localhost/pause:1"
CNI_PLUGINS = Path("/usr/lib/cni")
# `kubectl logs` and `exec` go to the node by its name.
NODE = "localhost"


def missing() -> list[str]:
    """What this machine lacks."""
    programs = ("containerd", "ctr", "runc", "etcd", "busybox", "openssl", "ip")
    lacks = [name for name in programs if not shutil.which(name)]
    if not (CNI_PLUGINS / "bridge").exists():
        lacks.append(str(CNI_PLUGINS / "bridge"))
    if os.geteuid() != 0:
        lacks.append("root")
    return lacks


@dataclass
class Image:
    """Files, and how the first process is started; nothing is pulled."""

    name: str
    files: dict[str, bytes]
    entrypoint: list[str]
    user: str = ""
    links: dict[str, str] = field(default_factory=dict)

    def archive(self, path: Path) -> None:
        """As `docker save` writes it."""
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            for name, content in self.files.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(content), 0o755
                tar.addfile(entry, io.BytesIO(content))
            for name, target in self.links.items():
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = tarfile.SYMTYPE, target
                tar.addfile(entry)
            scratch = tarfile.TarInfo("tmp")
            scratch.type, scratch.mode = tarfile.DIRTYPE, 0o1777
            tar.addfile(scratch)
        content = layer.getvalue()
        config = {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
            "os": "linux",
            "config": {"Entrypoint": self.entrypoint, "User": self.user, "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}"]},
        }
        manifest = [{"Config": "config.json", "RepoTags": [self.name], "Layers": ["layer.tar"]}]
        with tarfile.open(path, "w") as tar:
            for name, part in (
                ("layer.tar", content),
                ("config.json", json.dumps(config).encode()),
                ("manifest.json", json.dumps(manifest).encode()),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(part)
                tar.addfile(entry, io.BytesIO(part))


class Cluster:
    """Runs while it is entered. `programs` is a directory with Kubernetes' own."""

    def __init__(self, programs: Path, workdir: Path, images: list[Image]) -> None:
        self._programs = programs
        self.workdir = workdir
        self._images = images
        self._children: list[tuple[str, Child]] = []
        self._token = secrets.token_hex(16)
        self._socket = workdir / "containerd.sock"
        self.kubeconfig = workdir / "kubeconfig"

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    # Commands.

    def kubectl(self, *arguments: str, stdin: str | None = None, patience_s: float = 0.0) -> str:
        """What it prints."""
        command = [str(self._programs / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]
        done = run(command, stdin, patience_s)
        if done.returncode != 0:
            raise RigError(f"kubectl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *manifests: dict[str, Any], namespace: str = "default") -> None:
        wanted = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)})
        # `strict`: a field that is not known is refused, not only warned of.
        self.kubectl("apply", "-n", namespace, "--validate=strict", "-f", "-", stdin=wanted)

    def follow(self, name: str, *arguments: str) -> Child:
        """A kubectl that goes on, until it is stopped or this cluster is; its output is in its log."""
        command = [str(self._programs / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]
        # One log each, also of two that follow the same.
        return self._spawn(f"kubectl-{len(self._children)}-{name}", command)

    def kill(self, container_id: str) -> None:
        """SIGKILL to the first process of a container, as the kernel does when memory runs out."""
        tasks = self._ctr("tasks", "ls").splitlines()
        (process,) = [int(line.split()[1]) for line in tasks if line.startswith(container_id.split("//")[1])]
        os.kill(process, signal.SIGKILL)

    # Life.

    def _spawn(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> Child:
        child = Child(command, environment or {}, self.workdir / f"{name}.log")
        self._children.append((name, child))
        return child

    def _program(self, name: str, *flags: str) -> Child:
        return self._spawn(name, [str(self._programs / name), *flags])

    def _ctr(self, *arguments: str) -> str:
        done = run(["ctr", "--address", str(self._socket), "--namespace", "k8s.io", *arguments])
        if done.returncode != 0:
            raise RigError(f"ctr {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def _start(self) -> None:
        api, etcd, peer = free_port(), *(f"http://127.0.0.1:{free_port()}" for _ in range(2))
        flags = {
            "data-dir": str(self.workdir / "etcd"),
            "unsafe-no-fsync": "true",
            "listen-client-urls": etcd,
            "advertise-client-urls": etcd,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"default={peer}",
        }
        self._spawn("etcd", ["etcd", *(f"--{name}={value}" for name, value in flags.items())])
        self._start_containerd()
        key = self.workdir / "service-accounts.key"
        run(["openssl", "genrsa", "-out", str(key), "2048"]).check_returncode()
        tokens = self.workdir / "tokens.csv"
        tokens.write_text(f'{self._token},admin,1,"system:masters"\n')
        self.kubeconfig.write_text(json.dumps(self._kubeconfig(api)))
        certificates = self.workdir / "certificates"
        server = self._program(
            "kube-apiserver",
            f"--etcd-servers={etcd}",
            "--bind-address=127.0.0.1",
            f"--secure-port={api}",
            f"--cert-dir={certificates}",
            # A loopback address may not be advertised; no pod of ours calls the API.
            "--endpoint-reconciler-type=none",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            f"--service-cluster-ip-range={SERVICES}",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default",
            "--kubelet-preferred-address-types=Hostname",
        )

        def answers() -> bool:
            server.must_run("the API server")
            with contextlib.suppress(RigError):
                return self.kubectl("get", "--raw", "/readyz") == "ok"
            return False

        wait_until("the API server is ready", answers, START_TIMEOUT_S)
        self._program(
            "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig}",
            "--leader-elect=false",
            "--secure-port=0",
            "--use-service-account-credentials",
            f"--service-account-private-key-file={key}",
            f"--root-ca-file={certificates / 'apiserver.crt'}",
        )
        self._program("kube-scheduler", f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", "--secure-port=0")
        self._start_kubelet()

    def _start_containerd(self) -> None:
        # The first pod would make it; something that pods call may want to listen there before.
        for command in (
            ["link", "add", BRIDGE, "type", "bridge"],
            ["address", "add", f"{GATEWAY}/24", "dev", BRIDGE],
            ["link", "set", BRIDGE, "up"],
        ):
            run(["ip", *command]).check_returncode()
        network = {
            "cniVersion": "0.4.0",
            "name": "test",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": BRIDGE,
                    "isGateway": True,
                    "ipam": {"type": "host-local", "subnet": PODS, "dataDir": str(self.workdir / "ipam")},
                },
                {"type": "loopback"},
            ],
        }
        networks = self.workdir / "networks"
        networks.mkdir()
        (networks / "test.conflist").write_text(json.dumps(network))
        config = self.workdir / "containerd.toml"
        # restrict_oom_score_adj: root in a container may lack CAP_SYS_RESOURCE.
        config.write_text(
            f"""version = 2
root = "{self.workdir}/containerd"
state = "{self.workdir}/containerd-state"
[grpc]
address = "{self._socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI_PLUGINS}"
conf_dir = "{networks}"
"""
        )
        containerd = self._spawn("containerd", ["containerd", "--config", str(config)])

        def answers() -> bool:
            containerd.must_run("containerd")
            return run(["ctr", "--address", str(self._socket), "version"]).returncode == 0

        wait_until("containerd answers", answers, START_TIMEOUT_S)
        busybox = Path(shutil.which("busybox") or "").read_bytes()
        pause = Image(PAUSE, {"bin/busybox": busybox}, ["/bin/busybox", "sleep", "2147483647"])
        for number, image in enumerate([pause, *self._images]):
            archive = self.workdir / f"image-{number}.tar"
            image.archive(archive)
            self._ctr("images", "import", str(archive))
            archive.unlink()

    def _start_kubelet(self) -> None:
        (self.workdir / "resolv.conf").touch()
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": "127.0.0.1",
            "port": free_port(),
            "healthzPort": 0,
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "containerRuntimeEndpoint": f"unix://{self._socket}",
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            "failSwapOn": False,
            "makeIPTablesUtilChains": False,
            "podLogsDir": str(self.workdir / "pods"),
            "volumePluginDir": str(self.workdir / "volume-plugins"),
            "resolvConf": str(self.workdir / "resolv.conf"),
            # A full disk of this machine is nothing that a test could mend.
            "evictionHard": {"memory.available": "1Mi", "nodefs.available": "0.1%", "imagefs.available": "0.1%"},
            "imageGCHighThresholdPercent": 100,
        }
        path = self.workdir / "kubelet.json"
        path.write_text(json.dumps(config))
        kubelet = self._program(
            "kubelet",
            f"--config={path}",
            f"--kubeconfig={self.kubeconfig}",
            f"--root-dir={self.workdir / 'kubelet'}",
            f"--cert-dir={self.workdir / 'kubelet-certificates'}",
            f"--hostname-override={NODE}",
        )

        def ready() -> bool:
            kubelet.must_run("the kubelet")
            nodes = json.loads(self.kubectl("get", "nodes", "-o", "json"))["items"]
            conditions = [one for node in nodes for one in node["status"]["conditions"]]
            return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

        wait_until("the node is ready", ready, START_TIMEOUT_S)

    def _kubeconfig(self, port: int) -> dict[str, Any]:
        server = {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": server}],
            "users": [{"name": "admin", "user": {"token": self._token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "current-context": "test",
        }

    def _stop(self) -> None:
        # The kubelet first: it would start again what is ended here.
        for name, child in reversed(self._children):
            if name != "containerd":
                child.stop()
        for name, child in self._children:
            if name == "containerd":
                with contextlib.suppress(RigError):
                    wait_until("all containers have ended", self._no_container)
                child.stop()
        for mount in reversed(mounts_below(self.workdir)):
            run(["umount", "--lazy", mount])
        run(["ip", "link", "delete", BRIDGE])
        remove_cgroups()
        # A kubelet links all logs here, whatever its settings.
        for link in Path("/var/log/containers").glob("*.log"):
            if link.is_symlink() and link.readlink().is_relative_to(self.workdir):
                link.unlink()

    def _no_container(self) -> bool:
        """Whether none is left; those that are get killed. The end of one may be that of another."""
        left = [line.split()[0] for line in self._ctr("tasks", "ls").splitlines()[1:]]
        for container in left:
            with contextlib.suppress(RigError):
                self._ctr("tasks", "delete", "--force", container)
        return not left


def run(
    command: list[str], stdin: str | None = None, patience_s: float = 0.0
) -> subprocess.CompletedProcess[str]:
    timeout = COMMAND_TIMEOUT_S + patience_s
    return subprocess.run(command, input=stdin or "", capture_output=True, text=True, timeout=timeout)


def mounts_below(path: Path) -> list[str]:
    places = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return [place for place in places if place.startswith(f"{path}/")]


def remove_cgroups() -> None:
    """What a kubelet leaves; a group with processes in it stays."""
    roots = [Path("/sys/fs/cgroup/kubepods"), *Path("/sys/fs/cgroup").glob("*/kubepods")]
    for group in [group for root in roots for group in below(root)]:
        with contextlib.suppress(OSError):
            group.rmdir()


def below(root: Path) -> Iterator[Path]:
    """Directories, the innermost first."""
    for path, _, _ in os.walk(root, topdown=False):
        yield Path(path)


def seconds(what: str, since: float) -> None:
    """A figure for whoever reads the test's output."""
    print(f"{what}: {time.monotonic() - since:.1f} s")
