"""The fields of Kubernetes' and KubeRay's objects that our files use, typed; others are refused.

Names, types and constraints are those of the types in KubeRay's ``ray-operator/apis/ray/v1`` (1.5.1
or newer, for ``authOptions``) and of Kubernetes' core API; `check` does what the operator's own
validation does before it accepts a cluster.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Label = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(m|Mi|Gi)?$")]
Port = Annotated[int, Field(gt=0, lt=65536)]


class Strict(BaseModel):
    """Refuses fields that are not named and values that are not of their type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Metadata(Strict):
    """``metav1.ObjectMeta``; KubeRay's names are DNS labels of at most 47 letters."""

    name: Label
    labels: dict[str, str] = {}


class SecretKey(Strict):
    """``corev1.SecretKeySelector``."""

    name: str
    key: str


class ValueSource(Strict):
    """``corev1.EnvVarSource``, of secrets only."""

    secretKeyRef: SecretKey  # noqa: N815 - Kubernetes' name, as all below


class Variable(Strict):
    """``corev1.EnvVar``."""

    name: str
    value: str | None = None
    valueFrom: ValueSource | None = None  # noqa: N815


class ContainerPort(Strict):
    """``corev1.ContainerPort``."""

    name: Annotated[str, Field(max_length=15)]
    containerPort: Port  # noqa: N815


class Mount(Strict):
    """``corev1.VolumeMount``."""

    name: str
    mountPath: str  # noqa: N815


class Amounts(Strict):
    """``corev1.ResourceList``, of what every pod says."""

    cpu: Quantity
    memory: Quantity


class Resources(Strict):
    """``corev1.ResourceRequirements``."""

    requests: Amounts
    limits: Amounts


class Container(Strict):
    """``corev1.Container``."""

    name: str
    image: str
    command: list[str] = []
    env: list[Variable] = []
    ports: list[ContainerPort] = []
    volumeMounts: list[Mount] = []  # noqa: N815
    resources: Resources


class Claim(Strict):
    """``corev1.PersistentVolumeClaimVolumeSource``."""

    claimName: str  # noqa: N815


class MapSource(Strict):
    """``corev1.ConfigMapVolumeSource``."""

    name: str


class Volume(Strict):
    """``corev1.Volume``."""

    name: str
    persistentVolumeClaim: Claim | None = None  # noqa: N815
    configMap: MapSource | None = None  # noqa: N815


class PodSpec(Strict):
    """``corev1.PodSpec``."""

    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []


class PodTemplate(Strict):
    """``corev1.PodTemplateSpec``."""

    metadata: dict[str, dict[str, str]] = {}
    spec: PodSpec


class Credential(Strict):
    """``RedisCredential``: never a password in a file."""

    valueFrom: ValueSource  # noqa: N815


class FaultTolerance(Strict):
    """``GcsFaultToleranceOptions``."""

    redisAddress: Annotated[str, Field(pattern=r"^[a-z0-9.-]+:[0-9]+$")]  # noqa: N815
    redisPassword: Credential  # noqa: N815


class Auth(Strict):
    """``AuthOptions``."""

    mode: Literal["disabled", "token"]


class AutoscalerOptions(Strict):
    """``AutoscalerOptions``."""

    idleTimeoutSeconds: int  # noqa: N815
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]  # noqa: N815


class HeadGroup(Strict):
    """``HeadGroupSpec``."""

    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"]  # noqa: N815
    rayStartParams: dict[str, str]  # noqa: N815
    template: PodTemplate


class WorkerGroup(Strict):
    """``WorkerGroupSpec``."""

    groupName: str  # noqa: N815
    replicas: int
    minReplicas: int  # noqa: N815
    maxReplicas: int  # noqa: N815
    rayStartParams: dict[str, str]  # noqa: N815
    template: PodTemplate


class ClusterSpec(Strict):
    """``RayClusterSpec``."""

    rayVersion: str  # noqa: N815
    authOptions: Auth  # noqa: N815
    gcsFaultToleranceOptions: FaultTolerance | None = None  # noqa: N815
    enableInTreeAutoscaling: bool  # noqa: N815
    autoscalerOptions: AutoscalerOptions  # noqa: N815
    headGroupSpec: HeadGroup  # noqa: N815
    workerGroupSpecs: list[WorkerGroup]  # noqa: N815

    @property
    def pods(self) -> list[PodSpec]:
        """The head's, then the workers'."""
        groups = [self.headGroupSpec, *self.workerGroupSpecs]
        return [group.template.spec for group in groups]

    def check(self) -> None:
        """Assert what KubeRay's operator does, and that every mounted volume is there."""
        major, minor, _ = map(int, self.rayVersion.split("."))
        assert (major, minor) >= (2, 52), "tokens need Ray 2.52"
        redis = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}
        assert not redis & {one.name for pod in self.pods for one in pod.containers[0].env}
        starts = [self.headGroupSpec, *self.workerGroupSpecs]
        assert not {"redis-password", "labels"} & {key for g in starts for key in g.rayStartParams}
        for group in self.workerGroupSpecs:
            assert 0 <= group.minReplicas <= group.replicas <= group.maxReplicas
        for pod in self.pods:
            check_mounts(pod)


class RayCluster(Strict):
    """KubeRay's ``RayCluster``."""

    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class JobSpec(Strict):
    """``RayJobSpec``."""

    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode"]  # noqa: N815
    backoffLimit: Annotated[int, Field(ge=0)]  # noqa: N815
    shutdownAfterJobFinishes: bool  # noqa: N815
    ttlSecondsAfterFinished: Annotated[int, Field(ge=0)]  # noqa: N815
    rayClusterSpec: ClusterSpec  # noqa: N815


class RayJob(Strict):
    """KubeRay's ``RayJob``."""

    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


class ServiceSpec(Strict):
    """``RayServiceSpec``."""

    serveConfigV2: str  # noqa: N815
    rayClusterConfig: ClusterSpec  # noqa: N815


class RayService(Strict):
    """KubeRay's ``RayService``."""

    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayService"]
    metadata: Metadata
    spec: ServiceSpec


class ConfigMap(Strict):
    """``corev1.ConfigMap``."""

    apiVersion: Literal["v1"]  # noqa: N815
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: dict[str, str]


class ServicePort(Strict):
    """``corev1.ServicePort``."""

    name: str
    port: Port


class NetworkSpec(Strict):
    """``corev1.ServiceSpec``."""

    type: Literal["ClusterIP"]
    selector: dict[str, str]
    ports: list[ServicePort]


class Service(Strict):
    """``corev1.Service``."""

    apiVersion: Literal["v1"]  # noqa: N815
    kind: Literal["Service"]
    metadata: Metadata
    spec: NetworkSpec


class Storage(Strict):
    """``corev1.ResourceList``, of a claim."""

    storage: Quantity


class ClaimResources(Strict):
    """``corev1.VolumeResourceRequirements``."""

    requests: Storage


class ClaimSpec(Strict):
    """``corev1.PersistentVolumeClaimSpec``."""

    accessModes: list[Literal["ReadWriteOnce", "ReadWriteMany"]]  # noqa: N815
    resources: ClaimResources


class VolumeClaim(Strict):
    """``corev1.PersistentVolumeClaim``."""

    apiVersion: Literal["v1"]  # noqa: N815
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


class DeploymentStrategy(Strict):
    """``appsv1.DeploymentStrategy``."""

    type: Literal["Recreate", "RollingUpdate"]


class Selector(Strict):
    """``metav1.LabelSelector``."""

    matchLabels: dict[str, str]  # noqa: N815


class DeploymentSpec(Strict):
    """``appsv1.DeploymentSpec``."""

    replicas: int
    strategy: DeploymentStrategy
    selector: Selector
    template: PodTemplate


class Deployment(Strict):
    """``appsv1.Deployment``."""

    apiVersion: Literal["apps/v1"]  # noqa: N815
    kind: Literal["Deployment"]
    metadata: Metadata
    spec: DeploymentSpec


Object = Annotated[
    RayCluster | RayJob | RayService | ConfigMap | Service | VolumeClaim | Deployment,
    Field(discriminator="kind"),
]


# Any: whichever of the kinds above
def read_objects(path: Path) -> dict[str, Any]:
    """Return the objects of a file by kind, each kind once."""
    documents = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    objects = [TypeAdapter(Object).validate_python(document) for document in documents]
    found = {one.kind: one for one in objects}
    assert len(found) == len(objects)
    return found


def check_mounts(pod: PodSpec) -> None:
    """Assert that what a pod's containers mount is there, and nothing for nobody."""
    mounted = {mount.name for container in pod.containers for mount in container.volumeMounts}
    assert mounted == {volume.name for volume in pod.volumes}
