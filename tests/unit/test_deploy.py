"""The files of deploy/: what they promise of containers, and that what they name exists."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import typer.main
import yaml

from lorand.config import load
from lorand_coordinator import cli as coordinator_cli
from lorand_worker import cli as worker_cli

DEPLOY: Final = Path(__file__).resolve().parent.parent.parent / "deploy"
COMPOSE: Final = sorted(DEPLOY.glob("compose*.yaml"))
MANIFESTS: Final = sorted((DEPLOY / "kubernetes").glob("*/*.yaml"))
BUILT: Final = {"coordinator": "lorand-coordinator:0.1.0", "worker": "lorand-worker:0.1.0"}
SCRIPTS: Final = {
    "lr-seat": DEPLOY / "worker" / "seat.py",
    "lr-invitations": DEPLOY / "coordinator" / "invitations.py",
}
WRITTEN_ELSEWHERE: Final = {"./data"}
"""Folders of a user's own."""

KNOWN: Final[dict[str, str]] = {
    "service": "image build user read_only tmpfs cap_drop security_opt init restart command "
    "entrypoint environment secrets volumes ports healthcheck depends_on profiles scale "
    "network_mode",
    "healthcheck": "test interval timeout retries start_period disable",
    "object": "apiVersion kind metadata spec",
    "metadata": "name labels",
    "Service": "clusterIP publishNotReadyAddresses selector ports",
    "StatefulSet": "serviceName replicas selector template volumeClaimTemplates",
    "Job": "parallelism completions backoffLimit template",
    "PersistentVolumeClaim": "accessModes resources",
    "pod": "automountServiceAccountToken shareProcessNamespace securityContext containers volumes "
    "restartPolicy",
    "podSecurity": "runAsNonRoot runAsUser runAsGroup fsGroup fsGroupChangePolicy seccompProfile",
    "container": "name image command args env ports securityContext startupProbe readinessProbe "
    "resources volumeMounts",
    "probe": "exec periodSeconds timeoutSeconds failureThreshold",
    "mount": "name mountPath readOnly",
    "volume": "name configMap secret persistentVolumeClaim emptyDir",
    "Kustomization": "apiVersion kind resources patches configMapGenerator generatorOptions",
}
"""Fields of the Compose specification and of Kubernetes' API that these files use."""


def known(kind: str, content: dict[str, Any]) -> None:
    """Fail at fields that are not in the table: a field that is spelt wrong is silently ignored."""
    assert set(content) <= set(KNOWN[kind].split()), f"{kind}: {sorted(content)}"


@cache
def read(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def interpolated(text: str) -> str:
    """Put the defaults where a compose file has variables."""
    return re.sub(r"\$\{\w+(?::-([^}]*)|:\?[^}]*)?\}", lambda found: found[1] or "HOST:7700", text)


def services() -> Iterator[Any]:
    for path in COMPOSE:
        for name, service in read(path)[0]["services"].items():
            yield pytest.param(path, service, id=f"{path.stem}-{name}")


def objects(path: Path) -> list[dict[str, Any]]:
    return [each for each in read(path) if each["kind"] != "Kustomization"]


def workloads() -> Iterator[Any]:
    for path in MANIFESTS:
        for each in objects(path):
            if each["kind"] in ("StatefulSet", "Job") and path.name != "ledger.yaml":
                yield pytest.param(each, id=each["metadata"]["name"])


def words(service: dict[str, Any], image: str) -> list[str]:
    """Return what a container of ours runs: program, then arguments."""
    program = service.get("entrypoint") or ["lr-worker" if "worker" in image else "lr-coordinator"]
    return [interpolated(word) for word in [*program, *service.get("command", [])]]


def check_command(command: list[str]) -> None:
    """Fail unless each flag is one that the program has."""
    program, *rest = command
    flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
    if program in SCRIPTS:
        text = SCRIPTS[program].read_text(encoding="utf-8")
        if program == "lr-seat":  # what it does not know goes to `lr-worker join`
            text += repr(options(worker_cli.app, "join"))
        for flag in flags:
            assert f'"{flag}"' in text or f"'{flag}'" in text, flag
        return
    app = worker_cli.app if program == "lr-worker" else coordinator_cli.app
    assert set(flags) <= set(options(app, rest[0])), command


@cache
def options(app: typer.Typer, command: str) -> list[str]:
    group: Any = typer.main.get_command(app)
    return [name for parameter in group.commands[command].params for name in parameter.opts]


@pytest.mark.parametrize(("path", "service"), [*services()])
def test_a_service_may_do_no_more_than_it_needs(path: Path, service: dict[str, Any]) -> None:
    known("service", service)
    image = interpolated(service["image"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].partition(":")[0]) > 0
    assert re.search(r":v?\d+(\.\d+)+", image), f"{image} has no version"
    assert "privileged" not in service
    for name in service.get("environment", {}):
        assert "PASSWORD" not in name or name.endswith("FILE"), f"{name} shows a secret"


@pytest.mark.parametrize(("path", "service"), [*services()])
def test_a_service_has_a_health_check_and_what_it_names_is_there(
    path: Path, service: dict[str, Any]
) -> None:
    check = service["healthcheck"]
    known("healthcheck", check)
    image = interpolated(service["image"])
    ours = image in BUILT.values()
    if ours:
        check_command(words(service, image))
    if check.get("disable"):
        assert "lr-invitations" in service["entrypoint"], "only what ends by itself has none"
    elif ours:
        assert check["test"][:3] == ["CMD", "lr-coordinator", "health"]
        check_command(check["test"][1:])
    content = read(path)[0]
    for secret in service.get("secrets", []):
        assert secret in content["secrets"]
    for volume in service.get("volumes", []):
        source = interpolated(volume).split(":")[0]
        there = source in content["volumes"] if source[0] != "." else (DEPLOY / source).exists()
        assert there or source in WRITTEN_ELSEWHERE, source
    for other, asked in dict.fromkeys(service.get("depends_on", [])).items():
        assert other in content["services"], asked
    if "build" in service:
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()


def test_the_composed_run_file_can_be_served() -> None:
    config = load(DEPLOY / "run" / "run.toml")
    assert config.run.adopt_first_worker
    same = DEPLOY / "kubernetes" / "coordinator" / "run.toml"
    assert same.read_text(encoding="utf-8") == (DEPLOY / "run" / "run.toml").read_text("utf-8")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_manifest_has_known_fields_and_names_files_that_are_there(path: Path) -> None:
    for each in read(path):
        if each["kind"] == "Kustomization":
            known("Kustomization", each)
            made = [file for one in each.get("configMapGenerator", []) for file in one["files"]]
            patches = [one["path"] for one in each.get("patches", [])]
            for file in [*each["resources"], *patches, *made]:
                assert (path.parent / file).exists(), file
            continue
        known("object", each)
        known("metadata", each["metadata"])
        known(each["kind"], each["spec"])


@pytest.mark.parametrize("workload", [*workloads()])
def test_a_pod_may_do_no_more_than_it_needs_and_is_asked_for_its_health(
    workload: dict[str, Any],
) -> None:
    pod = workload["spec"]["template"]["spec"]
    known("pod", pod)
    known("podSecurity", pod["securityContext"])
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["runAsNonRoot"] is True
    claimed = [one["metadata"]["name"] for one in workload["spec"].get("volumeClaimTemplates", [])]
    volumes = {volume["name"] for volume in pod["volumes"]} | {*claimed}
    (container,) = pod["containers"]
    known("container", container)
    assert container["image"] in BUILT.values()
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    known("probe", container["readinessProbe"])
    probe = container["readinessProbe"]["exec"]["command"]
    assert probe[:2] == ["lr-coordinator", "health"]
    check_command(probe)
    program = container.get("command", ["lr-coordinator"])
    check_command([*program, *container["args"]])
    for mount in container["volumeMounts"]:
        known("mount", mount)
        assert mount["name"] in volumes
    for volume in pod["volumes"]:
        known("volume", volume)


def test_the_patch_for_postgres_changes_only_where_the_ledger_is() -> None:
    (base,) = (
        each
        for each in read(DEPLOY / "kubernetes/coordinator/coordinator.yaml")
        if each["kind"] == "StatefulSet"
    )
    (patch,) = read(DEPLOY / "kubernetes/postgres/ledger.yaml")
    (before,) = base["spec"]["template"]["spec"]["containers"]
    (after,) = patch["spec"]["template"]["spec"]["containers"]
    check_command(["lr-coordinator", *after["args"]])
    different = {word.partition("=")[0] for word in {*before["args"]} ^ {*after["args"]}}
    assert different == {"--ledger"}


@pytest.mark.parametrize("role", ["coordinator", "worker"])
def test_an_image_has_a_version_one_user_and_its_script(role: str) -> None:
    text = (DEPLOY / role / "Dockerfile").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert "USER 10001:10001" in lines
    assert re.search(r"^ARG BASE=python:\d+\.\d+\.\d+-", text, re.MULTILINE)
    assert [line for line in lines if line.startswith("FROM")][-1] == "FROM ${BASE}"
    scripts = {path.name for path in SCRIPTS.values() if path.parent.name == role}
    (installed,) = {Path(word).name for word in shlex.split(text, comments=True)} & scripts
    assert f"!deploy/{role}/{installed}" in (DEPLOY.parent / ".dockerignore").read_text("utf-8")
