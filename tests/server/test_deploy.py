"""The examples of ``deploy/`` parse, name what exists, and start the server with flags that it has."""

import argparse
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from imprompt.app import serve
from imprompt.app.server.settings import Limits

DEPLOY = Path(__file__).parents[2] / "deploy"
SECONDS = re.compile(r"(\d+)s?")


def flags(command: list[str]) -> argparse.Namespace:
    """The flags of an ``imprompt serve`` command. Exits where there is no such flag."""
    assert [Path(command[0]).name, command[1]] == ["imprompt", "serve"]
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(command[2:])


def test_compose_offers_a_server_for_cpu_and_one_for_cuda() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services) == {"cpu", "cuda"}
    for service in services.values():
        assert (DEPLOY.parent / service["build"]["dockerfile"]).is_file()
        assert (DEPLOY / service["build"]["context"]).resolve() == DEPLOY.parent
        assert service["ports"] == ["127.0.0.1:7860:7860"]
        assert int(SECONDS.fullmatch(service["stop_grace_period"])[1]) > Limits().drain_seconds
        assert "IMPROMPT_TOKEN" in service["environment"]
    assert flags(services["cuda"]["command"]).host == "0.0.0.0"


def test_the_image_copies_what_is_there_and_starts_the_server() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert all((DEPLOY.parent / source).exists() for source in sources)
    project = (DEPLOY.parent / "pyproject.toml").read_text()
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(","))
    caches = re.findall(r"(HF_HOME|XDG_CACHE_HOME)=(\S+)", text)
    assert len(caches) == 2
    assert all(place.startswith("/data/") for _, place in caches)  # the rest is read-only
    (command,) = re.findall(r"^CMD (\[.+\])$", text, re.MULTILINE)
    assert flags(yaml.safe_load(command)).host == "0.0.0.0"


def test_kubernetes_runs_one_server_that_can_drain_behind_one_service() -> None:
    parts = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "imprompt.yaml").read_text()))
    server, service = parts
    assert [part["kind"] for part in parts] == ["StatefulSet", "Service"]
    pod = server["spec"]["template"]
    assert "annotations" not in pod["metadata"]  # Prometheus sends no token for a pod found by those
    assert (
        pod["metadata"]["labels"] == server["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    )
    assert server["spec"]["serviceName"] == service["metadata"]["name"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > Limits().drain_seconds
    (container,) = pod["spec"]["containers"]
    assert flags(container["args"]).folder == "/data/server"
    paths = {name: probe["httpGet"]["path"] for name, probe in container.items() if name.endswith("Probe")}
    assert paths == {"livenessProbe": "/healthz", "readinessProbe": "/readyz", "startupProbe": "/readyz"}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    claimed = {claim["metadata"]["name"] for claim in server["spec"]["volumeClaimTemplates"]}
    assert mounted == claimed | {volume["name"] for volume in pod["spec"]["volumes"]}
    names = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_the_systemd_unit_starts_the_server_and_lets_it_drain(tmp_path: Path) -> None:
    text = (DEPLOY / "imprompt.service").read_text()
    (started,) = re.findall(r"^ExecStart=(.+)$", text, re.MULTILINE)
    assert flags(shlex.split(started)).token.startswith("@")
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert int(stop) > Limits().drain_seconds
    if shutil.which("systemd-analyze") is None:
        return
    unit = tmp_path / "imprompt.service"
    unit.write_text(text.replace("/opt/imprompt/bin/imprompt", "/bin/true"))
    found = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert "imprompt.service" not in found.stderr, found.stderr


@pytest.mark.skipif(shutil.which("docker") is None, reason="docker is not installed")
@pytest.mark.parametrize("profile", ["cpu", "cuda"])
def test_docker_compose_understands_the_file(profile: str) -> None:
    command = ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "--profile", profile, "config", "-q"]
    environment = {"IMPROMPT_TOKEN": "long enough", "PATH": "/usr/bin:/usr/local/bin:/bin"}
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if "unknown" in found.stderr or "not a docker command" in found.stderr:
        pytest.skip("docker has no compose plugin")
    assert found.returncode == 0, found.stderr
