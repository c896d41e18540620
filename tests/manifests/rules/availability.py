"""Rolls, drains, scaling and lost nodes."""

import math

import yaml
from objects import matches, pod_of, quantity, seconds, title

from . import rule


def autoscaler(objects, workload):
    """The HorizontalPodAutoscaler of a workload."""
    for one in objects.of("HorizontalPodAutoscaler"):
        target = one["spec"]["scaleTargetRef"]
        if (target["kind"], target["name"]) == (workload["kind"], workload["metadata"]["name"]):
            return one
    return None


def setting(objects, section, key, default):
    """A value of the service's configuration: what the environment says, else the file."""
    pod = objects.api()
    environment = objects.environment(pod, pod.containers[0])
    override = environment.get(f"CACHE_ASIDE__{section}__{key}".upper())
    mounted = next(volume["configMap"]["name"] for volume in pod.spec["volumes"] if "configMap" in volume)
    config = objects.get("ConfigMap", mounted)
    file = yaml.safe_load(config["data"]["cache-aside.yaml"]) if config else {}
    return override or file.get(section, {}).get(key, default)


@rule
def autoscaling(objects):
    for one in objects.of("HorizontalPodAutoscaler"):
        spec, target = one["spec"], one["spec"]["scaleTargetRef"]
        workload = objects.get(target["kind"], target["name"])
        if not workload:
            yield f"{title(one)}: {target['kind']}/{target['name']} does not exist"
            continue
        if spec.get("minReplicas", 1) > spec["maxReplicas"]:
            yield f"{title(one)}: minReplicas is more than maxReplicas"
        if "replicas" in workload["spec"]:
            yield f"{title(workload)}: replicas is the autoscaler's; every apply would reset it"
        if any("cpu" not in container.get("resources", {}).get("requests", {}) for container in pod_of(workload).containers):
            yield f"{title(one)}: measures against a request of cpu that is not there"


@rule
def disruption(objects):
    budgets = objects.of("PodDisruptionBudget")
    for budget in budgets:
        taken = [pod for pod in objects.pods() if matches(budget["spec"]["selector"], pod.labels)]
        if not taken:
            yield f"{title(budget)}: its selector takes no pod"
        for pod in taken:
            workload = objects.get(*pod.owner.split("/"))
            scaler = autoscaler(objects, workload)
            replicas = scaler["spec"].get("minReplicas", 1) if scaler else workload["spec"].get("replicas", 1)
            least, most = budget["spec"].get("minAvailable"), budget["spec"].get("maxUnavailable")
            if least is not None and share(least, replicas) >= replicas:
                yield f"{title(budget)}: with {replicas} replicas no pod may ever be evicted, and a drain hangs"
            if most is not None and share(most, replicas) < 1:
                yield f"{title(budget)}: maxUnavailable {most} lets nobody drain a node"
    for pod in objects.pods():
        if pod.owner == "Deployment/cache-aside" and not any(matches(b["spec"]["selector"], pod.labels) for b in budgets):
            yield f"{pod.owner}: has no PodDisruptionBudget"


def share(value, of):
    return math.ceil(int(value.rstrip("%")) * of / 100) if isinstance(value, str) else value


@rule
def spread(objects):
    for pod in objects.pods():
        for constraint in pod.spec.get("topologySpreadConstraints", []):
            if constraint["whenUnsatisfiable"] != "ScheduleAnyway":
                yield f"{pod.owner}: after the loss of a node, {constraint['topologyKey']} keeps its pods Pending"
            if not matches(constraint["labelSelector"], pod.labels):
                yield f"{pod.owner}: spreads other pods than its own"
        for kind in ("podAffinity", "podAntiAffinity"):
            if "requiredDuringSchedulingIgnoredDuringExecution" in pod.spec.get("affinity", {}).get(kind, {}):
                yield f"{pod.owner}: a required {kind} keeps pods Pending"
        if pod.owner == "Deployment/cache-aside" and not pod.spec.get("topologySpreadConstraints"):
            yield f"{pod.owner}: all replicas may come to lie on one node"


@rule
def roll(objects):
    deployment = objects.get("Deployment", "cache-aside")
    if not deployment:
        return
    pod = pod_of(deployment)
    if deployment["spec"].get("strategy", {}).get("rollingUpdate", {}).get("maxUnavailable") != 0:
        yield "Deployment/cache-aside: a roll must not take away pods before others are ready"
    if not deployment["spec"].get("minReadySeconds"):
        yield "Deployment/cache-aside: wants minReadySeconds"
    check = next((one for one in pod.spec.get("initContainers", []) if one["args"] == ["check", "--offline"]), None)
    main = pod.containers[0]
    if not check:
        yield "Deployment/cache-aside: a bad configuration would replace a good one: check it before"
    elif any(check.get(key) != main.get(key) for key in ("image", "env", "envFrom", "volumeMounts")):
        yield "Deployment/cache-aside: what is checked is not what is run"
    drain = seconds(setting(objects, "server", "drain_delay", "3s"))
    shutdown = seconds(setting(objects, "server", "shutdown_timeout", "30s"))
    if pod.spec.get("terminationGracePeriodSeconds", 30) < drain + 2 * shutdown:
        yield f"Deployment/cache-aside: is killed before its drain ends ({drain:g} s, then twice {shutdown:g} s at most)"
    # A name without a hash: a change would not roll the pods, and half of them would have it.
    for name in [volume["configMap"]["name"] for volume in pod.spec["volumes"] if "configMap" in volume] + [
        source["configMapRef"]["name"] for source in main.get("envFrom", [])
    ]:
        if name in ("cache-aside", "cache-aside-environment"):
            yield f"Deployment/cache-aside: ConfigMap {name} has no hash in its name"


@rule
def connections(objects):
    deployment = objects.get("Deployment", "cache-aside")
    scaler = autoscaler(objects, deployment) if deployment else None
    allowed = [
        int(cluster["spec"]["postgresql"]["parameters"]["max_connections"]) for cluster in objects.of("Cluster")
    ] + [
        int(text.removeprefix("max_connections="))
        for pod in objects.pods()
        for container in pod.containers
        for text in container.get("args", [])
        if text.startswith("max_connections=")
    ]
    if not scaler or not allowed:
        return
    replicas = scaler["spec"]["maxReplicas"]
    surge = deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
    replicas += share(surge, replicas)
    # Two more for each: one asks for health, one for changes. And one that may decode the log, where that is wanted.
    others = 3 if setting(objects, "invalidation", "mode", "outbox") == "wal" else 2
    wanted = replicas * (int(setting(objects, "database", "pool_size", 16)) + others)
    # Superusers, migrations and people need some too.
    if wanted > allowed[0] - 10:
        yield f"{replicas} replicas want {wanted} connections, and the database allows {allowed[0]} less 10"


@rule
def one_at_a_time(objects):
    """One cache behind one Service, or one volume: two pods of it at a time would be two truths."""
    for deployment in objects.of("Deployment"):
        component = pod_of(deployment).labels.get("app.kubernetes.io/component")
        if component == "cache" and deployment["spec"].get("strategy", {}).get("type") != "Recreate":
            yield f"{title(deployment)}: for a moment of each roll it is two caches"
        if component == "cache" and deployment["spec"].get("replicas", 1) != 1:
            yield f"{title(deployment)}: more than one replica is more than one cache"
