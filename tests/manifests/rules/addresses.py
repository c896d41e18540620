"""How requests find pods: selectors, ports, the ingress."""

from objects import WORKLOADS, matches, pod_of, title

from . import rule


@rule
def selectors(objects):
    for workload in objects.of(*WORKLOADS):
        selector = workload["spec"].get("selector")
        # A Job's is made by the API server.
        if workload["kind"] != "Job" and not matches(selector, pod_of(workload).labels):
            yield f"{title(workload)}: its selector does not take its own pods"
        elif workload["kind"] != "Job":
            for other in objects.pods():
                if other.owner != title(workload) and matches(selector, other.labels):
                    yield f"{title(workload)}: its selector takes the pods of {other.owner} too"
    for service in objects.of("Service"):
        taken = [pod for pod in objects.pods() if matches(service["spec"]["selector"], pod.labels)]
        if not taken:
            yield f"{title(service)}: its selector takes no pod"
        if len(taken) > 1:
            yield f"{title(service)}: its selector takes the pods of {', '.join(pod.owner for pod in taken)}"
    for monitor in objects.of("ServiceMonitor"):
        selector = monitor["spec"]["selector"]
        taken = [one for one in objects.of("Service") if matches(selector, one["metadata"]["labels"])]
        names = {port.get("name") for one in taken for port in one["spec"]["ports"]}
        for endpoint in monitor["spec"]["endpoints"]:
            if endpoint["port"] not in names:
                yield f"{title(monitor)}: no Service that it takes has a port {endpoint['port']}"


@rule
def ports(objects):
    for pod in objects.pods():
        seen = set()
        for container in pod.all_containers:
            for port in container.get("ports", []):
                name = port.get("name", "")
                if not name or len(name) > 15 or name in seen:
                    yield f"{pod.owner}: port {port['containerPort']} needs a name of its own, up to 15 letters: {name!r}"
                seen.add(name)
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container.get(kind, {})
                port = (probe.get("httpGet") or probe.get("tcpSocket") or {}).get("port")
                if port is not None and port not in {one.get("name") for one in container.get("ports", [])}:
                    yield f"{pod.owner}: {kind} asks a port {port!r} that {container['name']} does not name"
    for service in objects.of("Service"):
        taken = [pod for pod in objects.pods() if matches(service["spec"]["selector"], pod.labels)]
        for port in service["spec"]["ports"]:
            name, target = port.get("name", ""), port.get("targetPort", port["port"])
            if not name or len(name) > 15:
                yield f"{title(service)}: port {port['port']} needs a name, up to 15 letters: {name!r}"
            for pod in taken:
                if target not in pod.ports and target not in pod.ports.values():
                    yield f"{title(service)}: {pod.owner} has no port {target!r}"


@rule
def ingress(objects):
    for one in objects.of("Ingress"):
        spec = one["spec"]
        hosts = {entry.get("host") for entry in spec["rules"]}
        if None in hosts:
            yield f"{title(one)}: a rule without a host answers for every name"
        if spec.get("tls") and {host for entry in spec["tls"] for host in entry["hosts"]} != hosts:
            yield f"{title(one)}: the certificate is for other hosts than the rules"
        for path in (path for entry in spec["rules"] for path in entry["http"]["paths"]):
            backend = path["backend"]["service"]
            service = objects.get("Service", backend["name"])
            names = {port.get("name") for port in service["spec"]["ports"]} if service else set()
            if backend["port"].get("name") not in names:
                yield f"{title(one)}: {path['path']} leads to no port of Service/{backend['name']}"
            if backend["port"].get("name") == "management":
                yield f"{title(one)}: {path['path']} leads to the management port"
            if not path["path"].startswith(("/api", "/openapi.json", "/docs")):
                yield f"{title(one)}: {path['path']} is more than the API and its description"
