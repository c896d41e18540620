"""Rendered manifests, and the questions that rules ask of them."""

import base64
import re
from dataclasses import dataclass

WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job")


@dataclass
class Pod:
    """A pod as some object will make it."""

    owner: str  # Kind/name
    labels: dict
    spec: dict
    ports: dict  # name -> number

    @property
    def containers(self) -> list:
        return self.spec.get("containers", [])

    @property
    def all_containers(self) -> list:
        return self.spec.get("initContainers", []) + self.containers


class Objects:
    """The objects of one rendering."""

    def __init__(self, name: str, documents: list):
        self.name = name
        self.documents = documents

    def of(self, *kinds: str) -> list:
        return [one for one in self.documents if one["kind"] in kinds]

    def get(self, kind: str, name: str) -> dict | None:
        return next((one for one in self.of(kind) if one["metadata"]["name"] == name), None)

    def pods(self) -> list:
        found = [pod_of(one) for one in self.of(*WORKLOADS)]
        # An operator makes these, so their labels and ports are what it documents.
        for cluster in self.of("Cluster"):
            labels = cluster["spec"].get("inheritedMetadata", {}).get("labels", {})
            labels = {**labels, "cnpg.io/cluster": cluster["metadata"]["name"]}
            ports = {"postgresql": 5432, "status": 8000, "metrics": 9187}
            found.append(Pod(title(cluster), labels, {}, ports))
        for ingress in self.of("Ingress"):
            if "cert-manager.io/cluster-issuer" in ingress["metadata"].get("annotations", {}):
                solver = {"acme.cert-manager.io/http01-solver": "true"}
                found.append(Pod(f"Certificate/{ingress['metadata']['name']}", solver, {}, {"http": 8089}))
        return found

    def api(self) -> Pod | None:
        return next((pod for pod in self.pods() if pod.owner == "Deployment/cache-aside"), None)

    def secrets(self) -> dict:
        """Secret name -> the values of its keys, wherever they will come from; unknown ones are made up."""
        found = {}
        for secret in self.of("Secret"):
            data = {key: base64.b64decode(value).decode() for key, value in secret.get("data", {}).items()}
            found[secret["metadata"]["name"]] = {**data, **secret.get("stringData", {})}
        for external in self.of("ExternalSecret"):
            target = external["spec"]["target"]
            fetched = {one["secretKey"]: made_up(one["secretKey"]) for one in external["spec"].get("data", [])}
            template = target.get("template", {}).get("data")
            fill = lambda text: re.sub(r"\{\{\s*\.([\w-]+)[^}]*\}\}", lambda name: fetched[name[1]], text)
            found[target["name"]] = {key: fill(text) for key, text in template.items()} if template else fetched
        for sealed in self.of("SealedSecret"):
            found[sealed["metadata"]["name"]] = {
                key: made_up(key, sealed["metadata"]["name"]) for key in sealed["spec"]["encryptedData"]
            }
        for cluster in self.of("Cluster"):
            keys = ("dbname", "host", "password", "port", "uri", "username")
            found[cluster["metadata"]["name"] + "-app"] = {key: made_up(key) for key in keys}
        return found

    def environment(self, pod: Pod, container: dict) -> dict:
        """What the container will find in its environment."""
        found = {}
        for source in container.get("envFrom", []):
            config = self.get("ConfigMap", source.get("configMapRef", {}).get("name", ""))
            found.update(config["data"] if config else {})
        for one in container.get("env", []):
            reference = one.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                values = self.secrets().get(reference["name"], {})
                found[one["name"]] = values.get(reference["key"], made_up(reference["key"], reference["name"]))
            else:
                found[one["name"]] = re.sub(r"\$\((\w+)\)", lambda name: found.get(name[1], ""), one.get("value", ""))
        return found


def pod_of(workload: dict) -> Pod:
    template = workload["spec"]["template"]
    ports = {
        port.get("name", ""): port["containerPort"]
        for container in template["spec"]["containers"]
        for port in container.get("ports", [])
    }
    return Pod(title(workload), template["metadata"].get("labels", {}), template["spec"], ports)


def title(one: dict) -> str:
    return f"{one['kind']}/{one['metadata']['name']}"


def matches(selector: dict | None, labels: dict) -> bool:
    """Whether a label selector takes these labels. An empty one takes all, none takes nothing."""
    if selector is None:
        return False
    # Services have the labels directly.
    wanted = selector if not {"matchLabels", "matchExpressions"} & selector.keys() else selector.get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items())


def made_up(key: str, secret: str = "") -> str:
    """Something of the right form for a value that only the cluster knows."""
    if key != "uri":
        return "0123456789abcdef"
    return "redis://:secret@cache:6379" if secret == "cache-aside-cache" else "postgres://app:secret@database:5432/app"


def quantity(text) -> float:
    """A Kubernetes quantity as a number."""
    units = {"m": 1e-3, "": 1, "k": 1e3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()
    return float(number) * units[unit]


def seconds(text) -> float:
    """One of the service's durations in seconds."""
    units = {"ms": 1e-3, "s": 1, "m": 60, "h": 3600}
    number, unit = re.fullmatch(r"(\d+) ?(ms|s|m|h)", str(text)).groups()
    return int(number) * units[unit]
