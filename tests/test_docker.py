"""The container files, read: linters, schemas, and what the compose file promises.

test_docker_image.py executes Dockerfile.cpu.
"""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu", "Dockerfile.router"])
def test_hadolint_finds_nothing(name: str) -> None:
    done = _run(BIN / "hadolint", "--no-color", DOCKER / name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_images_run_under_any_user_of_group_0(name: str) -> None:
    """As OpenShift runs them; test_docker_image.py does so with the CPU's."""
    text = (DOCKER / name).read_text()
    assert "install -d -o qig -g 0 -m 2775 /cache" in text
    assert "chgrp -R 0 /home/qig" in text and "chmod -R g=u /home/qig" in text
    assert "HOME=/home/qig" in text  # Docker's own for a user it does not know is /


def test_versions_outside_the_lock_file_are_the_lock_files() -> None:
    lock = (DOCKER / "requirements-cpu.lock").read_text().splitlines()
    (step,) = (ln for ln in (DOCKER / "Dockerfile").read_text().splitlines() if "rich==" in ln)
    pinned = re.findall(r"(\S+==\S+)", step)
    assert len(pinned) == 3 and set(pinned) <= set(lock)


def test_compose_lint_passes(tmp_path: Path) -> None:
    # With MODEL_DIR filled in, or the rules about mounts are not looked at.
    text = re.sub(r"\$\{MODEL_DIR:[^}]+\}", "/models/m", (DOCKER / "compose.yaml").read_text())
    (tmp_path / "compose.yaml").write_text(text)
    for path in (DOCKER / "compose.yaml", tmp_path / "compose.yaml"):
        done = _run(BIN / "compose-lint", path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "not evaluated" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


def test_compose_has_three_profiles_and_prometheus(services: dict[str, Any]) -> None:
    assert {name: s["profiles"] for name, s in services.items()} == {
        "gpu": ["gpu"],
        "cpu": ["cpu"],
        "replica-0": ["fleet"],
        "replica-1": ["fleet"],
        "router": ["fleet"],
        "prometheus": ["gpu", "cpu", "fleet"],
    }


@pytest.mark.parametrize("name", ["gpu", "cpu", "replica-0", "replica-1"])
def test_compose_servers_are_confined(services: dict[str, Any], name: str) -> None:
    server = services[name]
    assert not server.keys() & {"ipc", "pid", "privileged", "network_mode", "user", "healthcheck"}
    assert server["shm_size"] == "8gb" and server["read_only"] and server["cap_drop"] == ["ALL"]
    model, cache = server["volumes"]
    assert model.endswith(":/model:ro") and cache == "cache:/cache"
    # The key comes from the shell that starts it, never from the file.
    assert server["environment"] == {"VLLM_API_KEY": "${VLLM_API_KEY:-}"}
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])
    # What is compiled must be loaded from a place that is not noexec, as Docker's tmpfs is.
    dockerfile = (DOCKER.parent / _dockerfile(services, server["image"])).read_text()
    caches = re.findall(r"^\s+(?:\w+_CACHE_\w+|HF_HOME)=(\S+)", dockerfile, re.M)
    assert len(caches) >= 3 and all(c.startswith("/cache/") for c in caches)


def _dockerfile(services: dict[str, Any], image: str) -> str:
    """Which file an image is built from; only one service builds it."""
    (build,) = (s["build"] for s in services.values() if s["image"] == image and "build" in s)
    return build["dockerfile"]


def test_the_fleet_is_two_servers_with_a_gpu_each_behind_the_router(
    services: dict[str, Any],
) -> None:
    router, gpus = services["router"], []
    words = router["command"]
    urls = words.index("--worker-urls")
    assert words[urls + 1 : urls + 3] == ["http://replica-0:8000", "http://replica-1:8000"]
    for name in ("replica-0", "replica-1"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        gpus += device["device_ids"]
        assert services[name]["ports"] == [] and services[name]["image"] == "qig-serve:cuda"
    assert gpus == ["0", "1"]
    # Its own routes know no key.
    assert router["ports"] == ["127.0.0.1:8000:8000"] and router["read_only"]
    assert router["cap_drop"] == ["ALL"] and router["security_opt"] == ["no-new-privileges:true"]
    assert "USER 10001" in (DOCKER / "Dockerfile.router").read_text()


def test_prometheus_finds_the_servers_and_knows_their_key(services: dict[str, Any]) -> None:
    job, router = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    (named,) = job["dns_sd_configs"]
    for name in ("gpu", "cpu", "replica-0", "replica-1"):
        assert services[name]["networks"]["default"]["aliases"] == named["names"]
        command = services[name]["command"]
        assert command[command.index("--port") + 1] == str(named["port"])
    (named,) = router["dns_sd_configs"]
    command = services[named["names"][0]]["command"]
    assert command[command.index("--prometheus-port") + 1] == str(named["port"])
    script = services["prometheus"]["entrypoint"][-1]
    assert f'"$$VLLM_API_KEY" > {job["authorization"]["credentials_file"]} ' in script
    assert services["prometheus"]["tmpfs"] == ["/run/key:mode=1777"]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_images_are_not_root_and_start_slowly(name: str) -> None:
    text = (DOCKER / name).read_text()
    assert re.findall(r"^USER (.+)$", text, re.M) == ["10001"]
    assert text.index("USER 10001") > text.rindex("\nRUN ")
    start = re.search(r"^HEALTHCHECK .*--start-period=(\d+)s", text, re.M)
    assert start and int(start[1]) >= 900
    assert 'ENTRYPOINT ["qig-serve"]' in text and 'VOLUME ["/cache"]' in text
    # A layer keeps what an ARG or ENV was given.
    names = re.findall(r"^ARG (\w+)|^(?:ENV)?\s+([A-Z_]+)=", text, re.M)
    assert not [n for pair in names for n in pair if re.search("KEY|TOKEN|SECRET|PASSWORD", n)]


def test_the_build_sees_no_secrets_or_rubbish() -> None:
    ignored = (DOCKER.parent / ".dockerignore").read_text().split()
    assert {".git", ".venv", ".demo", "**/.env", "**/__pycache__"} <= {*ignored}


def test_the_cuda_image_installs_locked_versions() -> None:
    lock = (DOCKER / "requirements-cpu.lock").read_text().split()
    installed = re.findall(r"\S+==\S+", (DOCKER / "Dockerfile").read_text())
    assert len(installed) == 3 and {*installed} <= {*lock}
    assert not re.search(r"pip install.*[<>]", (DOCKER / "Dockerfile").read_text())


# --- Kubernetes ----------------------------------------------------------------------------------


def _validate(path: Path, version: str) -> subprocess.CompletedProcess[str]:
    # The schemas come with the package: nothing is fetched.
    return _run(BIN / "kubernetes-validate", "--strict", "-k", version, path)


@pytest.mark.parametrize("version", ["1.27", "1.37"])
@pytest.mark.parametrize("name", ["qig-serve.yaml", "router.yaml"])
def test_kubernetes_schema(name: str, version: str) -> None:
    done = _validate(DOCKER / "k8s" / name, version)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("replicas: 2", "replicas: two"),
        ("maxUnavailable: 1\n  selector", "maxUnavailible: 1\n  selector"),
        ("containerPort: 8000", "port: 8000"),
    ],
)
def test_the_schema_check_can_fail(right: str, wrong: str, tmp_path: Path) -> None:
    text = (DOCKER / "k8s" / "qig-serve.yaml").read_text()
    assert right in text
    (tmp_path / "broken.yaml").write_text(text.replace(right, wrong))
    assert _validate(tmp_path / "broken.yaml", "1.37").returncode != 0


def test_kubernetes_objects_belong_together() -> None:
    text = (DOCKER / "k8s" / "qig-serve.yaml").read_text()
    objects = {o["kind"]: o for o in yaml.safe_load_all(text)}
    assert objects.keys() == {"Deployment", "Service", "PodDisruptionBudget"}
    deployment, template = objects["Deployment"]["spec"], objects["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    for selector in (
        deployment["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    (server,) = template["spec"]["containers"]
    port = server["ports"][0]["name"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": port}
    start = server["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 1800
    mounts = [m["name"] for m in server["volumeMounts"]]
    assert sorted(mounts) == sorted(v["name"] for v in template["spec"]["volumes"])
    assert template["spec"]["securityContext"]["runAsUser"] == 10001


def test_kubernetes_router_finds_the_servers_and_has_the_flags_that_were_tried(
    services: dict[str, Any],
) -> None:
    def objects(name: str) -> dict[str, Any]:
        text = (DOCKER / "k8s" / name).read_text()
        return {o["kind"]: o for o in yaml.safe_load_all(text)}

    router, servers = objects("router.yaml"), objects("qig-serve.yaml")
    template = router["Deployment"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in container["args"])
    key, _, value = flags["selector"].partition("=")
    pods = servers["Deployment"]["spec"]["template"]
    assert pods["metadata"]["labels"][key] == value
    (port,) = pods["spec"]["containers"][0]["ports"]
    assert int(flags["service-discovery-port"]) == port["containerPort"]
    words = services["router"]["command"]
    tried = {w.removeprefix("--"): v for w, v in pairwise(words)}
    own = {"service-discovery", "selector", "service-discovery-port", "service-discovery-namespace"}
    assert {k: v for k, v in flags.items() if k not in own}.items() <= tried.items()
    (account,) = router["RoleBinding"]["subjects"]
    assert account["name"] == template["spec"]["serviceAccountName"]
    for kind in ("Service", "NetworkPolicy"):
        spec = router[kind]["spec"]
        selector = spec["selector"] if kind == "Service" else spec["podSelector"]["matchLabels"]
        assert selector.items() <= template["metadata"]["labels"].items()


# As of the chart's values.schema.json. The schema allows keys that it does not know, so a misspelt
# one would be passed over in silence: hence a list of those that we use.
STACK_KEYS = {
    "name": str,
    "repository": str,
    "tag": str,
    "modelURL": str,
    "replicaCount": int,
    "requestCPU": int,
    "requestMemory": str,
    "requestGPU": int,
    "pvcStorage": str,
    "pvcAccessMode": list,
    "vllmConfig": dict,
}
STACK_VLLM_KEYS = {
    "maxModelLen": int,
    "tensorParallelSize": int,
    "enablePrefixCaching": bool,
    "extraArgs": list,
}


def test_production_stack_values() -> None:
    values = yaml.safe_load((DOCKER / "k8s" / "production-stack-values.yaml").read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    assert {k: type(v) for k, v in model.items()} == STACK_KEYS
    assert {k: type(v) for k, v in model["vllmConfig"].items()} == STACK_VLLM_KEYS
    assert "--allowed-media-domains" in model["vllmConfig"]["extraArgs"]


def test_base_image_is_a_supported_vllm() -> None:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    match = re.search(r"^FROM vllm/vllm-openai:v(\S+)$", (DOCKER / "Dockerfile").read_text(), re.M)
    assert match and Version(match[1]) in SpecifierSet(">=0.26,<0.34")
