"""KubeRay's files: known fields only, closed to strangers, and running what this project has."""

from __future__ import annotations

import shlex
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from cluster.learn import LearnConfig
from serve.config import KEYS_VARIABLE
from serve.deploy import ServeArguments, build
from serve.proxy import ENVIRONMENT
from tests.ray_configs.kubernetes import (
    ClusterSpec,
    FaultTolerance,
    RayCluster,
    check_mounts,
    read_objects,
)

CONFIGS = Path(__file__).resolve().parents[2] / "ray_configs"


def clusters() -> dict[str, ClusterSpec]:
    """Return the cluster that each file describes."""
    job = read_objects(CONFIGS / "rayjob.yaml")["RayJob"].spec
    service = read_objects(CONFIGS / "rayservice.yaml")["RayService"].spec
    return {
        "raycluster": read_objects(CONFIGS / "raycluster.yaml")["RayCluster"].spec,
        "rayjob": job.rayClusterSpec,
        "rayservice": service.rayClusterConfig,
    }


@pytest.mark.parametrize("name", ["raycluster", "rayjob", "rayservice"])
def test_clusters_are_what_the_operator_takes_grow_by_demand_and_want_a_token(name: str) -> None:
    cluster = clusters()[name]
    cluster.check()
    assert cluster.rayVersion == version("ray")
    assert cluster.authOptions.mode == "token"
    assert cluster.enableInTreeAutoscaling
    assert all(group.minReplicas < group.maxReplicas for group in cluster.workerGroupSpecs)
    assert cluster.headGroupSpec.serviceType == "ClusterIP", "the dashboard is inside only"
    (image,) = {container.image for pod in cluster.pods for container in pod.containers}
    assert image == f"unicuco:{version('unicuco')}"


@pytest.mark.parametrize("name", ["raycluster", "rayservice"])
def test_what_lives_on_keeps_its_state_in_the_redis_that_is_described(name: str) -> None:
    objects = read_objects(CONFIGS / "redis.yaml")
    options = clusters()[name].gcsFaultToleranceOptions
    assert isinstance(options, FaultTolerance)
    (port,) = objects["Service"].spec.ports
    assert options.redisAddress == f"{objects['Service'].metadata.name}:{port.port}"
    pod = objects["Deployment"].spec.template
    check_mounts(pod.spec)
    (container,) = pod.spec.containers
    (password,) = container.env
    assert password.valueFrom == options.redisPassword.valueFrom
    assert [one.containerPort for one in container.ports] == [port.port]
    labels = objects["Deployment"].spec.selector.matchLabels
    assert objects["Service"].spec.selector == labels == pod.metadata["labels"]
    (volume,) = pod.spec.volumes
    assert volume.persistentVolumeClaim is not None
    assert volume.persistentVolumeClaim.claimName == objects["PersistentVolumeClaim"].metadata.name


def test_the_job_learns_what_its_map_says_and_a_new_try_goes_on(tmp_path: Path) -> None:
    objects = read_objects(CONFIGS / "rayjob.yaml")
    job, words = objects["RayJob"].spec, shlex.split(objects["RayJob"].spec.entrypoint)
    assert words[:4] == ["python", "-m", "cluster.learn", "--config"]
    head = job.rayClusterSpec.pods[0]
    (mount,) = [one for one in head.containers[0].volumeMounts if one.name == "learn"]
    (volume,) = [one for one in head.volumes if one.name == "learn"]
    assert volume.configMap is not None
    assert volume.configMap.name == objects["ConfigMap"].metadata.name
    (file,) = objects["ConfigMap"].data
    assert words[4:] == [f"{mount.mountPath}/{file}"]
    (tmp_path / file).write_text(objects["ConfigMap"].data[file])
    config = LearnConfig.read(tmp_path / file)
    options = config.to_domain()
    assert job.backoffLimit > 0
    assert options.resume, "or a second try would be refused"
    (runs,) = [one for one in head.containers[0].volumeMounts if one.name == "runs"]
    assert options.out.is_relative_to(runs.mountPath), "or nothing would outlive the cluster"


def test_the_service_is_what_serve_deploys_to_those_who_have_a_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = read_objects(CONFIGS / "rayservice.yaml")["RayService"].spec
    schema = ServeDeploySchema.model_validate(yaml.safe_load(spec.serveConfigV2))
    (application,) = schema.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    monkeypatch.setenv(KEYS_VARIABLE, "one-long-key")
    config = ServeArguments.model_validate(application.args).to_domain()
    assert config.key_digests
    assert config.store.startswith("postgresql+psycopg://"), "SQLite is not for several nodes"
    for pod in spec.rayClusterConfig.pods:
        variables = {one.name: one for one in pod.containers[0].env}
        assert variables[KEYS_VARIABLE].valueFrom is not None, "keys are never in the file"
        for name, value in ENVIRONMENT.items():
            assert variables[name].value == value


def test_a_field_that_kuberay_does_not_have_is_refused() -> None:
    document = yaml.safe_load((CONFIGS / "raycluster.yaml").read_text())
    document["spec"]["enableAutoscaling"] = True
    with pytest.raises(ValidationError, match="enableAutoscaling"):
        RayCluster.model_validate(document)
