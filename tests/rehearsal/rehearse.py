"""A rehearsal without a cluster: `make rehearse`, as root on Debian.

The rendered local overlay's pods run under podman with their own securityContext, each in a network namespace of its own.
A real Traefik stands in front with the rendered host rule, a real Prometheus scrapes. What a cluster would do besides, this
program does: it runs init containers first, asks readiness, moves endpoints, and rolls to a second image under load.
"""

import copy
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "manifests"))
import programs  # noqa: E402
import yaml  # noqa: E402
from objects import Objects  # noqa: E402

ROOT, WORK = programs.ROOT, programs.ROOT / "target/rehearsal"
IMAGE = "ghcr.io/cache-aside/cache-aside"
ADDRESSES = {"node": "10.77.0.1", "database": "10.77.0.2", "redis": "10.77.0.3", "migrate": "10.77.0.4", "one": "10.77.0.11", "two": "10.77.0.12"}
NAMES = {"cache-aside-database-rw": "database", "cache-aside-redis": "redis"}
SPACE = "cache-aside.svc.cluster.local"
PODMAN = ["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs"]


def sh(*command, check=True, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    if check and done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def within(name, *command):
    return ["nsenter", f"--net=/run/netns/rehearsal-{name}", *map(str, command)]


def networks():
    """A namespace for the node, with a bridge, and one for each pod."""
    sh("ip", "netns", "add", "rehearsal-node")
    node = ["ip", "-n", "rehearsal-node"]
    sh(*node, "link", "add", "bridge", "type", "bridge")
    sh(*node, "addr", "add", ADDRESSES["node"] + "/24", "dev", "bridge")
    for device in ("lo", "bridge"):
        sh(*node, "link", "set", device, "up")
    for name, address in ADDRESSES.items():
        if name != "node":
            sh("ip", "netns", "add", f"rehearsal-{name}")
            inside = ["ip", "-n", f"rehearsal-{name}"]
            sh(*node, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", f"rehearsal-{name}")
            sh(*node, "link", "set", name, "master", "bridge", "up")
            sh(*inside, "addr", "add", address + "/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                sh(*inside, "link", "set", device, "up")


def names():
    """The cluster's DNS: Services by their full names, which pods have in their list of what to append."""
    space = SPACE.partition(".")[2]
    (WORK / "resolv.conf").write_text(
        f"nameserver {ADDRESSES['node']}\nsearch {SPACE} {space} {space.partition('.')[2]}\noptions ndots:5\n")
    records = [f"--host-record={host}.{SPACE},{ADDRESSES[name]}" for host, name in NAMES.items()]
    server = ["dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--no-hosts", "--no-resolv", "--local=/#/", *records]
    return subprocess.Popen(within("node", *server), stderr=subprocess.DEVNULL)


def clean():
    for name in ADDRESSES:
        sh(*PODMAN, "pod", "rm", "--force", f"rehearsal-{name}", check=False)
    # Volumes are what podman made of the ConfigMaps.
    for kind in ("secret", "volume"):
        for name in sh("podman", kind, "ls", "--format", "{{.Name}}", check=False).split():
            if name.startswith("cache-aside-"):
                sh("podman", kind, "rm", name, check=False)
    for name in ADDRESSES:
        sh("ip", "netns", "del", f"rehearsal-{name}", check=False)
    shutil.rmtree(WORK, ignore_errors=True)


def play(objects, name, workload, tag=None, user=None, check=True):
    """Runs a workload's pod as `name`: its init containers to their end, then its containers."""
    template = copy.deepcopy(objects.get(*workload.split("/"))["spec"]["template"])
    spec = template["spec"]
    if user:
        spec["securityContext"] |= {"runAsUser": user, "runAsGroup": 0}
    # What podman has no notion of; and the host's network is the namespace in which podman is started.
    for key in ("topologySpreadConstraints", "tolerations", "serviceAccountName", "terminationGracePeriodSeconds", "enableServiceLinks"):
        spec.pop(key, None)
    spec |= {"hostNetwork": True, "restartPolicy": "Never"}
    volumes = {volume["name"]: volume for volume in spec.setdefault("volumes", [])}
    volumes["resolver"] = {"name": "resolver", "hostPath": {"path": str(WORK / "resolv.conf"), "type": "File"}}
    for claim in objects.get(*workload.split("/"))["spec"].get("volumeClaimTemplates", []):
        volumes[claim["metadata"]["name"]] = {"name": claim["metadata"]["name"], "emptyDir": {}}
    for volume in volumes.values():
        if "emptyDir" in volume:
            path = WORK / name / volume["name"]
            path.mkdir(parents=True)
            # As the kubelet does for fsGroup.
            os.chown(path, 0, spec["securityContext"].get("fsGroup", 0))
            path.chmod(0o2777)
            volume.pop("emptyDir")
            volume["hostPath"] = {"path": str(path), "type": "Directory"}
    spec["volumes"] = list(volumes.values())
    for container in spec.get("initContainers", []) + spec["containers"]:
        for key in ("ports", "startupProbe", "readinessProbe", "livenessProbe"):
            container.pop(key, None)
        container.setdefault("volumeMounts", []).append(
            {"name": "resolver", "mountPath": "/etc/resolv.conf", "readOnly": True})
        if tag and container["image"].startswith(IMAGE):
            container["image"] = f"{IMAGE}:{tag}"
    # The kubelet fills in $(NAME).
    pod_of = next(pod for pod in objects.pods() if pod.owner == workload)
    for original, container in zip(pod_of.containers, spec["containers"], strict=True):
        known = objects.environment(pod_of, original)
        for key in ("command", "args"):
            if key in container:
                container[key] = [re.sub(r"\$\((\w+)\)", lambda found: known[found[1]], word) for word in container[key]]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"rehearsal-{name}", "labels": template["metadata"]["labels"]}, "spec": spec}
    configs = copy.deepcopy(objects.of("ConfigMap"))
    for config in configs:
        config["metadata"].pop("namespace", None)
    file = WORK / f"{name}.yaml"
    file.write_text(yaml.safe_dump_all([*configs, pod]))
    sh(*within(name, *PODMAN, "kube", "play", "--network", "host", file), check=check)


def secrets(objects):
    """Podman reads a Secret's keys out of JSON."""
    for secret in objects.of("Secret"):
        file = WORK / "secret.json"
        file.write_text(json.dumps(secret["data"]))
        sh("podman", "secret", "create", secret["metadata"]["name"], file)
        file.unlink()


def wait(what, condition, limit=60):
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > limit:
            sys.exit(f"{what}: not within {limit} s")
        time.sleep(0.05)
    return time.monotonic() - started


def answers(name, path="/readyz", port=9090):
    url = f"http://{ADDRESSES[name]}:{port}{path}"
    return sh(*within("node", "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-m", "2", url), check=False) == "200"


def route(objects, names):
    """Traefik's file: the rendered Ingress, with these pods behind it. Renamed into place, so that it is read whole."""
    ingress = objects.get("Ingress", "cache-aside")["spec"]["rules"][0]
    routers = {}
    for number, path in enumerate(ingress["http"]["paths"]):
        match = "PathPrefix" if path["pathType"] == "Prefix" else "Path"
        rule = f"Host(`{ingress['host']}`) && {match}(`{path['path']}`)"
        routers[f"path{number}"] = {"rule": rule, "service": "api", "entryPoints": ["web"]}
    servers = [{"url": f"http://{ADDRESSES[name]}:8080"} for name in names]
    config = {"http": {"routers": routers, "services": {"api": {"loadBalancer": {"servers": servers}}}}}
    folder = WORK / "traefik"
    folder.mkdir(exist_ok=True)
    (WORK / "dynamic.yaml").write_text(yaml.safe_dump(config))
    (WORK / "dynamic.yaml").rename(folder / "dynamic.yaml")


def get(path):
    """Through the ingress; status, headers and body."""
    url = f"http://{ADDRESSES['node']}{path}"
    out = sh(*within("node", "curl", "-si", "-m", "5", "-H", "Host: cache-aside.local", url), check=False)
    if not out:
        return 0, "", ""
    head, _, body = out.partition("\r\n\r\n") if "\r\n\r\n" in out else out.partition("\n\n")
    return int(head.split()[1]), head.lower(), body


LOAD = """
import http.client, json, sys, threading, time
results, stop = {}, time.time() + float(sys.argv[2])
def client():
    connection = http.client.HTTPConnection(sys.argv[1], 80, timeout=10)
    while time.time() < stop:
        try:
            connection.request("GET", "/api/products/3", headers={"Host": "cache-aside.local"})
            answer = connection.getresponse(); answer.read(); kind = str(answer.status)
        except Exception as error:
            kind = repr(error); connection = http.client.HTTPConnection(sys.argv[1], 80, timeout=10)
        results[kind] = results.get(kind, 0) + 1
        time.sleep(0.002)
threads = [threading.Thread(target=client) for _ in range(8)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(json.dumps(results))
"""


def main():
    clean()
    WORK.mkdir(parents=True)
    (WORK / "containers.conf").write_text('[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n')
    os.environ["CONTAINERS_CONF"] = str(WORK / "containers.conf")
    sh(ROOT / "tests/rehearsal/bases.sh")
    objects = Objects("local", programs.render("kustomize/overlays/local"))
    tag = objects.api().containers[0]["image"].rpartition(":")[2]
    build = ["buildah", "bud", "--layers", "--isolation", "chroot", "--pull-never", "--network", "host"]
    build += ["--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]
    started = time.monotonic()
    sh("nice", *build, "--build-arg", f"VERSION={tag}", "-t", f"{IMAGE}:{tag}", ROOT)
    print(f"image: built in {time.monotonic() - started:.0f} s")
    # Another image of the same program, so that there is something to roll to.
    following = sh("buildah", "from", "--pull-never", f"{IMAGE}:{tag}")
    sh("buildah", "config", "--label", f"org.opencontainers.image.version={tag}-next", following)
    sh("buildah", "commit", "--quiet", "--rm", following, f"{IMAGE}:{tag}-next")
    size = int(sh("podman", "image", "inspect", f"{IMAGE}:{tag}", "--format", "{{.Size}}"))
    print(f"image: {size / 1e6:.1f} MB")
    networks()
    secrets(objects)
    background = [names()]
    try:
        rehearse(objects, tag, background)
    finally:
        for process in background:
            process.terminate()
        clean()


def rehearse(objects, tag, background):
    play(objects, "database", "StatefulSet/cache-aside-database")
    play(objects, "redis", "Deployment/cache-aside-redis")
    for name, workload in (("database", "StatefulSet/cache-aside-database"), ("redis", "Deployment/cache-aside-redis")):
        container = objects.get(*workload.split("/"))["spec"]["template"]["spec"]["containers"][0]
        probe = [*PODMAN, "exec", f"rehearsal-{name}-{container['name']}", *container["readinessProbe"]["exec"]["command"]]
        ready = lambda: subprocess.run(within(name, *probe), capture_output=True, check=False).returncode == 0
        print(f"{name}: ready after {wait(name, ready):.1f} s")

    play(objects, "migrate", "Job/cache-aside-migrate")
    exit_code = sh(*PODMAN, "wait", "rehearsal-migrate-migrate")
    print(f"migration: exit code {exit_code}, {len(sh(*PODMAN, 'logs', 'rehearsal-migrate-migrate').splitlines())} lines")
    if exit_code != "0":
        sys.exit("the migration failed")

    route(objects, ["one"])
    started = time.monotonic()
    play(objects, "one", "Deployment/cache-aside")
    wait("the service", lambda: answers("one"))
    print(f"service: ready {time.monotonic() - started:.1f} s after its pod was asked for")
    confined("one")

    traefik = ["traefik", f"--providers.file.directory={WORK / 'traefik'}", "--providers.file.watch=true",
               "--entrypoints.web.address=:80", "--log.level=ERROR", "--global.checknewversion=false",
               "--global.sendanonymoususage=false"]
    traefik[0] = programs.program("traefik")
    background.append(subprocess.Popen(within("node", *traefik)))
    scrape = {"scrape_configs": [{"job_name": "cache-aside", "scrape_interval": "1s", "static_configs": [
        {"targets": [f"{ADDRESSES['one']}:9090"]}]}]}
    (WORK / "prometheus.yaml").write_text(yaml.safe_dump(scrape))
    background.append(subprocess.Popen(
        within("node", programs.program("prometheus"), f"--config.file={WORK / 'prometheus.yaml'}",
               f"--storage.tsdb.path={WORK / 'tsdb'}", "--log.level=error", "--web.listen-address=127.0.0.1:9999")))
    # It listens before it has read its file; a 404 of the service's own is a problem document.
    wait("Traefik", lambda: "problem+json" in get("/api/nothing")[1])

    for wanted in ("fwd=miss", "hit"):
        code, head, body = get("/api/fruit/1")
        line = next((line for line in head.splitlines() if line.startswith("cache-status")), "")
        print(f"ingress: {code} {line}  {body}")
        if code != 200 or f"; {wanted}" not in line:
            sys.exit(f"wanted {wanted}")
    for path in ("/metrics", "/readyz", "/admin/cache/fruit"):
        if get(path)[0] != 404:
            sys.exit(f"{path} can be reached through the ingress")
    print("ingress: /metrics, /readyz and /admin lead nowhere")

    def up():
        url = "http://127.0.0.1:9999/api/v1/query?query=up"
        out = sh(*within("node", "curl", "-s", url), check=False)
        found = json.loads(out or "{}").get("data", {}).get("result", [])
        return bool(found) and found[0]["value"][1] == "1"

    wait("Prometheus", up)
    print("Prometheus: target up")
    refused(objects)
    roll(objects, tag)


def confined(name):
    """What the process may do, as the kernel says."""
    state = json.loads(sh(*PODMAN, "inspect", f"rehearsal-{name}-cache-aside"))[0]
    status = pathlib.Path(f"/proc/{state['State']['Pid']}/status").read_text()
    facts = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if len(line.split()) > 1}
    seen = {"capabilities": facts["CapBnd"], "NoNewPrivs": facts["NoNewPrivs"], "root": facts["Uid"] == "0",
            "read-only root file system": state["HostConfig"]["ReadonlyRootfs"]}
    print(f"service: user {facts['Uid']}, " + ", ".join(f"{what} {is_so}" for what, is_so in seen.items() if what != "root")
          + f", {int(facts['VmRSS']) / 1000:.0f} MB")
    if list(seen.values()) != ["0" * 16, "1", False, True]:
        sys.exit("the service may do more than it should")


def refused(objects):
    """A configuration with a mistake ends in the check before the service, so that nothing of it ever serves."""
    mistaken = Objects("local", copy.deepcopy(objects.documents))
    environment = next(one for one in mistaken.of("ConfigMap") if "CACHE_ASIDE_CONFIG" in one["data"])
    environment["data"]["CACHE_ASIDE__DATABASE__POOLSIZE"] = "8"
    play(mistaken, "two", "Deployment/cache-aside", check=False)
    code = sh(*PODMAN, "inspect", "rehearsal-two-check", "--format", "{{.State.ExitCode}}")
    state = sh(*PODMAN, "inspect", "rehearsal-two-cache-aside", "--format", "{{.State.Status}}")
    said = subprocess.run([*PODMAN, "logs", "rehearsal-two-check"], capture_output=True, text=True, check=True).stderr.strip()
    print(f"a mistake in the configuration: exit code {code}, {said!r}; the service did not start")
    if code != "2" or state != "created":
        sys.exit("it was not refused")
    sh(*PODMAN, "pod", "rm", "--force", "rehearsal-two")


def roll(objects, tag):
    """As a Deployment and its Service do it: the new one ready for a while, then SIGTERM, and the endpoint goes a little later."""
    deployment = objects.get("Deployment", "cache-aside")["spec"]
    load = subprocess.Popen(within("node", sys.executable, "-c", LOAD, ADDRESSES["node"], "25"), stdout=subprocess.PIPE, text=True)
    time.sleep(3)
    # Under any other number it does as well: some platforms choose one for each namespace.
    play(objects, "two", "Deployment/cache-aside", f"{tag}-next", user=1000660000)
    wait("the second image", lambda: answers("two"))
    confined("two")
    time.sleep(deployment["minReadySeconds"])
    route(objects, ["one", "two"])
    time.sleep(2)
    grace = deployment["template"]["spec"]["terminationGracePeriodSeconds"]
    started = time.monotonic()
    stop = subprocess.Popen([*PODMAN, "stop", "--time", str(grace), "rehearsal-one-cache-aside"], stdout=subprocess.DEVNULL)
    # The endpoint is not gone at once: till the news is everywhere, requests still come.
    time.sleep(2)
    route(objects, ["two"])
    stop.wait()
    code = sh(*PODMAN, "inspect", "rehearsal-one-cache-aside", "--format", "{{.State.ExitCode}}")
    print(f"roll: the old pod ended after {time.monotonic() - started:.1f} s with exit code {code}")
    results = json.loads(load.communicate()[0])
    print(f"roll: {results.get('200', 0)} requests answered, {sum(results.values()) - results.get('200', 0)} failed")
    if set(results) != {"200"} or code != "0":
        sys.exit(f"requests failed: {results}")


if __name__ == "__main__":
    main()
