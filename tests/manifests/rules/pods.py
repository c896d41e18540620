"""What a pod may be and use: security, resources, volumes, probes, images."""

import re

from objects import quantity, title

from . import rule


@rule
def security(objects):
    for pod in objects.pods():
        if not pod.spec:
            continue
        context = pod.spec.get("securityContext", {})
        wanted = {
            "runAsNonRoot": context.get("runAsNonRoot") is True,
            "a runAsUser that is no root": isinstance(context.get("runAsUser"), int) and context["runAsUser"] > 0,
            "seccompProfile RuntimeDefault": context.get("seccompProfile", {}).get("type") == "RuntimeDefault",
            "automountServiceAccountToken: false": pod.spec.get("automountServiceAccountToken") is False,
            "enableServiceLinks: false": pod.spec.get("enableServiceLinks") is False,
            "the network of its own": not pod.spec.get("hostNetwork") and not pod.spec.get("hostPID"),
            "no hostPath": not any("hostPath" in volume for volume in pod.spec.get("volumes", [])),
        }
        for container in pod.all_containers:
            own, name = container.get("securityContext", {}), container["name"]
            wanted[f"{name}: readOnlyRootFilesystem"] = own.get("readOnlyRootFilesystem") is True
            wanted[f"{name}: allowPrivilegeEscalation: false"] = own.get("allowPrivilegeEscalation") is False
            wanted[f"{name}: drop ALL"] = own.get("capabilities", {}) == {"drop": ["ALL"]}
            wanted[f"{name}: no privileges"] = not own.get("privileged")
        for what, is_so in wanted.items():
            if not is_so:
                yield f"{pod.owner}: wants {what}"


@rule
def resources(objects):
    for pod in objects.pods():
        for container in pod.all_containers:
            given = container.get("resources", {})
            requests, limits = given.get("requests", {}), given.get("limits", {})
            for what, where in (("cpu", requests), ("memory", requests), ("memory", limits)):
                if what not in where:
                    yield f"{pod.owner}: {container['name']} lacks a {'request' if where is requests else 'limit'} of {what}"
            for what in requests.keys() & limits.keys():
                if quantity(requests[what]) > quantity(limits[what]):
                    yield f"{pod.owner}: {container['name']} requests more {what} than its limit"
            if container["name"] == "redis":
                limit = quantity(given.get("limits", {}).get("memory", 0))
                settings = redis_settings(objects, pod, container)
                most = re.fullmatch(r"(\d+)mb", settings.get("maxmemory", ""))
                if not most or int(most[1]) * 2**20 > 0.8 * limit:
                    yield f"{pod.owner}: maxmemory must be set, and leave a fifth of the limit"
                if not settings.get("maxmemory-policy", "").startswith("allkeys-"):
                    yield f"{pod.owner}: maxmemory-policy must evict any key"


def redis_settings(objects, pod, container):
    """What redis.conf says, what a script adds to it, and then the command."""
    mounted = [volume["configMap"]["name"] for volume in pod.spec.get("volumes", []) if "configMap" in volume]
    files = {name: text for config in mounted for name, text in objects.get("ConfigMap", config)["data"].items()}
    lines = [line.split(maxsplit=1) for line in files.get("redis.conf", "").splitlines() if " " in line and line[0] != "#"]
    lines += re.findall(r'^ *echo "([a-z-]+) (\$[A-Z_]+)"$', files.get("redis.sh", ""), re.M)
    words, environment = container.get("command", []), objects.environment(pod, container)
    lines += [(name[2:], value) for name, value in zip(words, words[1:]) if name.startswith("--")]
    fill = lambda value: re.sub(r"\$\(?([A-Z_]+)\)?", lambda found: environment.get(found[1], ""), value)
    return {name: fill(value) for name, value in lines}


@rule
def volumes(objects):
    for pod in objects.pods():
        there = {volume["name"] for volume in pod.spec.get("volumes", [])}
        for claim in next((one for one in objects.of("StatefulSet") if title(one) == pod.owner), {}).get("spec", {}).get(
            "volumeClaimTemplates", []
        ):
            there.add(claim["metadata"]["name"])
        mounted = {mount["name"] for container in pod.all_containers for mount in container.get("volumeMounts", [])}
        for name in mounted - there:
            yield f"{pod.owner}: volume {name} is mounted and does not exist"
        for name in there - mounted:
            yield f"{pod.owner}: volume {name} is mounted nowhere"


@rule
def probes(objects):
    for pod in objects.pods():
        if pod.owner.startswith("Job/"):
            continue
        for container in pod.containers:
            for kind in ("readinessProbe", "livenessProbe"):
                if kind not in container:
                    yield f"{pod.owner}: {container['name']} lacks a {kind}"
        if pod.owner != "Deployment/cache-aside":
            continue
        found = {kind: pod.containers[0].get(kind, {}) for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
        asked = {kind: probe.get("httpGet", {}) for kind, probe in found.items()}
        if asked["readinessProbe"].get("path") != "/readyz?exclude=database":
            yield f"{pod.owner}: what the cache can answer is asked for without the database too: /readyz?exclude=database"
        for kind in ("startupProbe", "livenessProbe"):
            if asked[kind].get("path") != "/livez":
                yield f"{pod.owner}: {kind} must not depend on the database: /livez"
        patience = {k: probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3) for k, probe in found.items()}
        if patience["livenessProbe"] < 3 * patience["readinessProbe"]:
            yield f"{pod.owner}: liveness must be far more patient than readiness"
        if any(probe.get("port") != "management" for probe in asked.values()):
            yield f"{pod.owner}: health is on the management port"


@rule
def images(objects):
    ours = set()
    for pod in objects.pods():
        for container in pod.all_containers:
            image = container["image"]
            name, _, tag = image.split("@")[0].rpartition(":")
            if "@sha256:" not in image and ("/" in tag or not name or tag == "latest"):
                yield f"{pod.owner}: {image} has no fixed tag"
            if image.startswith("ghcr.io/cache-aside/cache-aside"):
                ours.add(image)
            elif not re.match(r"[a-z.]+\.[a-z]+/", image):
                yield f"{pod.owner}: {image} does not name its registry"
    if len(ours) > 1:
        yield f"two versions of the service at once: {', '.join(sorted(ours))}"


@rule
def labels(objects):
    wanted = {"app.kubernetes.io/name", "app.kubernetes.io/component", "app.kubernetes.io/part-of"}
    for one in objects.documents:
        for name in sorted(wanted - one["metadata"].get("labels", {}).keys()):
            yield f"{title(one)}: lacks the label {name}"
    for pod in objects.pods():
        # Whose labels nobody here can choose.
        if pod.owner.startswith("Certificate/"):
            continue
        for name in sorted(wanted - pod.labels.keys()):
            yield f"{pod.owner}: its pods lack the label {name}"
