"""The checks that other programs do: each yields sentences, or says that it was skipped and why."""

import copy
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import yaml
from objects import title

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
TOOLS = ROOT / "target/manifests"


class Missing(Exception):
    """A program that is not there. A check that nobody makes is one that nobody misses, so it counts as failed."""


class NotYet(Exception):
    """Something that a later version of the service will do: nothing to judge today."""


def program(name: str) -> str:
    beside = [TOOLS / "venv/bin" / name, TOOLS / "tools" / name]
    found = next((str(path) for path in beside if path.exists()), None) or shutil.which(name)
    if not found:
        raise Missing(f"there is no {name}, and Debian does not give it: install it")
    return found


def run(*command, **options):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)


def render(path: str) -> list:
    """The objects of a kustomization."""
    done = run(program("kubectl"), "kustomize", path, cwd=ROOT)
    if done.returncode != 0:
        raise ValueError(done.stderr.strip())
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def hadolint():
    done = run(program("hadolint"), "Dockerfile", cwd=ROOT)
    yield from done.stdout.splitlines() + done.stderr.splitlines() if done.returncode else []


def yamllint():
    folders = ("k8s", "kustomize", "argocd", "tests/manifests")
    done = run(program("yamllint"), "--strict", "--format=parsable", "-c", HERE / "yamllint.yaml", *folders, cwd=ROOT)
    yield from done.stdout.splitlines() if done.returncode else []


def shell():
    """Scripts that run in a container can at least be parsed."""
    for script in sorted((ROOT / "kustomize").rglob("*.sh")):
        done = run("sh", "-n", script)
        yield from done.stderr.splitlines()


def readmes():
    for component in sorted((ROOT / "kustomize/components").iterdir()):
        readme = component / "README.md"
        lines = readme.read_text().splitlines() if readme.exists() else []
        if [line[:9] for line in lines[2:]] != ["- **Adds*", "- **Sets*", "- **Needs"] or lines[0] != f"# {component.name}":
            yield f"{readme.relative_to(ROOT)}: has five lines: name, sentence, adds, sets, needs"


def prometheus_rules(objects):
    """The rules and the unit tests of the alerts, judged by promtool."""
    promtool = program("promtool")
    rules = [copy.deepcopy(one["spec"]) for one in objects.of("PrometheusRule")]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        tested = (HERE / "alerts_test.yaml").read_text()
        for spec in rules:
            for entry in (entry for group in spec["groups"] for entry in group["rules"]):
                if "alert" in entry and f"alertname: {entry['alert']}\n" not in tested:
                    yield f"{entry['alert']} has no test"
                if "alert" in entry and not {"summary", "description", "runbook"} <= entry["annotations"].keys():
                    yield f"{entry['alert']} wants summary, description and runbook"
            (folder / "rules.yaml").write_text(yaml.safe_dump(spec))
            done = run(promtool, "check", "rules", "--lint=all", folder / "rules.yaml")
            yield from (done.stdout + done.stderr).splitlines() if done.returncode else []
            # The tests are of when an alert speaks. What it says was parsed above, and would have to be repeated in them.
            for entry in (entry for group in spec["groups"] for entry in group["rules"]):
                entry.pop("annotations", None)
            (folder / "rules.yaml").write_text(yaml.safe_dump(spec))
            (folder / "alerts_test.yaml").write_text(tested)
            done = run(promtool, "test", "rules", folder / "alerts_test.yaml", cwd=folder)
            yield from (done.stdout + done.stderr).splitlines() if done.returncode else []


# Metrics that the source does not declare: those of the process, and what a later version of the service will report.
OTHER_METRICS = {
    "process_cpu_seconds_total": [],
    "process_open_fds": [],
    "process_resident_memory_bytes": [],
    "process_start_time_seconds": [],
    "cache_aside_breaker_state": ["backend"],
}


def declared_metrics():
    """Each metric of the service with its labels, as the source declares it: a name, a help, and mostly labels."""
    source = (ROOT / "src/telemetry/metrics.rs").read_text()
    found = list(re.finditer(r'"((?:cache_aside|http)_[a-z_]+)"', source))
    for one, following in zip(found, [*found[1:], None]):
        labels = re.search(r"&\[((?:\"\w+\"[, ]*)+)\]", source[one.end() : following.start() if following else one.end() + 300])
        # This one gives its metrics their label by itself.
        by_resource = re.search(r"\bgauges\(\s*&registry,\s*$", source[: one.start()])
        yield one[1], re.findall(r"\w+", labels[1]) if labels else ["resource"] if by_resource else []


def metrics(objects):
    """Alerts and the dashboard ask for metrics that there are, by labels that they have, in PromQL that parses."""
    promtool = program("promtool")
    known = {**dict(declared_metrics()), **OTHER_METRICS}
    asked = [
        (title(one), entry["expr"])
        for one in objects.of("PrometheusRule")
        for group in one["spec"]["groups"]
        for entry in group["rules"]
    ]
    for config in objects.of("ConfigMap"):
        for name, text in config.get("data", {}).items():
            if name.endswith(".json"):
                for panel in json.loads(text)["panels"]:
                    asked += [(f"{title(config)}: {panel['title']}", each["expr"]) for each in panel.get("targets", [])]
    recorded = {
        entry["record"]
        for one in objects.of("PrometheusRule")
        for group in one["spec"]["groups"]
        for entry in group["rules"]
        if "record" in entry
    }
    for place, expression in asked:
        for name, labels in re.findall(r"\b([a-z_:][a-z0-9_:]+)(?:\{([^}]*)\}|(?=\[|\s*[)<>=*/]|\s*$))", expression):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            if not re.match(r"cache_aside_|http_|process_|namespace", name) or name in recorded or name == "namespace":
                continue
            if base not in known:
                yield f"{place}: there is no metric {name}"
                continue
            allowed = {*known[base], "namespace", "pod", "job", "le"}
            for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", labels):
                if label not in allowed:
                    yield f"{place}: {name} has no label {label}"
    rules = [
        {"record": f"parsed:{number}", "expr": expression.replace("$__rate_interval", "5m").replace("$", "")}
        for number, (_, expression) in enumerate(asked)
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({"groups": [{"name": "parsed", "rules": rules}]}, file)
        file.flush()
        done = run(promtool, "check", "rules", file.name)
        yield from (done.stdout + done.stderr).splitlines() if done.returncode else []


def binary() -> str:
    """The service itself, as the tests or `make manifests` built it."""
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    builds = [os.environ.get("CACHE_ASIDE_BIN", ""), target / "debug/cache-aside", target / "release/cache-aside"]
    found = next((str(path) for path in builds if path and pathlib.Path(path).exists()), None)
    if not found:
        raise Missing("the service is not built: cargo build")
    return found


def commands(objects):
    """The commands and options that pods start the service with are those that it has."""
    service = binary()
    for pod in objects.pods():
        for container in pod.all_containers:
            if not container["image"].startswith("ghcr.io/cache-aside/cache-aside"):
                continue
            done = run(service, *container["args"], "--help")
            if done.returncode:
                yield f"{pod.owner}: {done.stderr.splitlines()[0]}"


def configuration(objects):
    """What the init container will say to this configuration."""
    service, pod = binary(), objects.api()
    check = next((one for one in pod.spec.get("initContainers", []) if one["name"] == "check"), pod.containers[0])
    environment = objects.environment(pod, check)
    mounted = next(volume["configMap"]["name"] for volume in pod.spec["volumes"] if "configMap" in volume)
    config = objects.get("ConfigMap", mounted)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in config["data"].items():
            (pathlib.Path(folder) / name).write_text(text)
        file = environment.get("CACHE_ASIDE_CONFIG", "")
        if not file.startswith("/etc/cache-aside/"):
            yield f"CACHE_ASIDE_CONFIG is {file!r}, and the file is mounted in /etc/cache-aside"
        environment["CACHE_ASIDE_CONFIG"] = file.replace("/etc/cache-aside", folder)
        done = run(service, "check", "--offline", env=environment)
        said = done.stderr.strip().replace(folder + "/", "")
        # An engine that this version of the service does not speak yet is the service's matter, not the manifests'.
        if done.returncode and "is not built yet" in said:
            raise NotYet(said)
        if done.returncode:
            yield said
