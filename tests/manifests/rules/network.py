"""Network policies: what they name exists, what must flow may, what must not may not."""

from objects import Pod, matches, title

from . import rule

TRAEFIK = Pod("Traefik", {"app.kubernetes.io/name": "traefik"}, {"namespace": "kube-system"}, {})
PROMETHEUS = Pod("Prometheus", {"app.kubernetes.io/name": "prometheus"}, {"namespace": "monitoring"}, {})
DNS = Pod("DNS", {"k8s-app": "kube-dns"}, {"namespace": "kube-system"}, {"dns": 53})
COLLECTOR = Pod("the collector", {}, {"namespace": "observability"}, {"otlp": 4318})
NAMESPACES = {"kube-system", "monitoring", "observability", "cnpg-system"}


@rule
def policies(objects):
    """Every label and port that a policy names is somebody's."""
    pods = objects.pods()
    for policy in objects.of("NetworkPolicy"):
        spec = policy["spec"]
        taken = [pod for pod in pods if takes(spec["podSelector"], pod)]
        if not taken:
            yield f"{title(policy)}: its podSelector takes no pod"
        for direction, side in (("ingress", "from"), ("egress", "to")):
            if direction in spec and direction.capitalize() not in spec["policyTypes"]:
                yield f"{title(policy)}: has {direction} rules and not the type"
            for entry in spec.get(direction, []):
                for peer in entry.get(side, []):
                    space = peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name")
                    if space and space not in NAMESPACES:
                        yield f"{title(policy)}: {space} is none of the namespaces that the documentation names"
                    client = "cache-aside/client" in peer.get("podSelector", {}).get("matchLabels", {})
                    if not space and not client and not any(takes(peer.get("podSelector"), pod) for pod in pods):
                        yield f"{title(policy)}: {side} {peer} is nobody"
                for port in entry.get("ports", []) if direction == "ingress" else []:
                    known = {value for pod in taken for pair in pod.ports.items() for value in pair}
                    if port["port"] not in known:
                        yield f"{title(policy)}: none of its pods has a port {port['port']}"


@rule
def flows(objects):
    """With these policies everything still works, and the management port is Prometheus' alone."""
    if not objects.of("NetworkPolicy"):
        return
    pods, api = objects.pods(), objects.api()
    by = lambda component: [pod for pod in pods if pod.labels.get("app.kubernetes.io/component") == component]
    wanted = [(TRAEFIK, api, api.ports["http"])] if objects.of("Ingress") else []
    wanted += [(PROMETHEUS, api, api.ports["management"])]
    for pod in pods:
        environments = [objects.environment(pod, container) for container in pod.all_containers]
        names = {name for environment in environments for name in environment}
        if "DATABASE_URL" in names:
            wanted += [(pod, database, 5432) for database in by("database")] + [(pod, DNS, 53)]
        if "CACHE_URL" in names:
            wanted += [(pod, cache, port) for cache in by("cache") for port in cache.ports.values()]
        if "OTEL_EXPORTER_OTLP_ENDPOINT" in names:
            wanted += [(pod, COLLECTOR, 4318)]
        if pod.owner.startswith("Certificate/"):
            wanted += [(TRAEFIK, pod, port) for port in pod.ports.values()]
        if "sentinel" in pod.ports:
            wanted += [(pod, pod, port) for port in pod.ports.values()] + [(pod, DNS, 53)]
        if "cnpg.io/cluster" in pod.labels:
            wanted += [(pod, pod, 5432), (pod, pod, 8000), (pod, DNS, 53)]
    for source, target, port in wanted:
        if not allowed(objects, source, target, port):
            yield f"{source.owner} can't reach {target.owner} at {port}"
    if objects.get("NetworkPolicy", "default-deny"):
        strangers = [Pod("a stranger", {"app": "stranger"}, {}, {}), TRAEFIK]
        for target in [api, *by("cache"), *by("database")]:
            for port in set(target.ports.values()) - {api.ports["http"]}:
                for source in strangers:
                    if allowed(objects, source, target, port):
                        yield f"{source.owner} can reach {target.owner} at {port}"


def takes(selector, pod):
    return selector is not None and matches(selector or {"matchLabels": {}}, pod.labels)


def allowed(objects, source, target, port):
    return side_allows(objects, "ingress", target, source, target, port) and side_allows(
        objects, "egress", source, target, target, port
    )


def side_allows(objects, direction, subject, peer, target, port):
    """Whether the policies of one side let the other through. Where none takes the pod, everything is let through."""
    if subject.spec.get("namespace"):
        return True
    own = [
        policy["spec"]
        for policy in objects.of("NetworkPolicy")
        if direction.capitalize() in policy["spec"]["policyTypes"] and takes(policy["spec"]["podSelector"], subject)
    ]
    side = "from" if direction == "ingress" else "to"
    return not own or any(
        fits_peer(entry.get(side), peer) and fits_port(entry.get("ports"), target, port)
        for spec in own
        for entry in spec.get(direction, [])
    )


def fits_peer(peers, pod):
    if peers is None:
        return True
    for peer in peers:
        space = peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name")
        if space == pod.spec.get("namespace") and ("podSelector" not in peer or takes(peer["podSelector"], pod)):
            return True
    return False


def fits_port(ports, target, number):
    return ports is None or any(target.ports.get(one["port"], one["port"]) == number for one in ports)
