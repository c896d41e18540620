"""Renders every kustomization and judges the result: `make manifests`.

In order: it renders; each object is what the API server takes; the project's own rules hold; each rule catches its broken
sample; what other programs say of Dockerfile, YAML, alerts and configuration; and Argo CD's project fits what it delivers.
"""

import copy
import os
import re
import sys

import jsonpatch
import programs
import schemas
import yaml
from objects import Objects, title
from programs import HERE, ROOT, Missing, NotYet
from rules import RULES

# What Argo CD is given: for clusters that are meant to last, and for a laptop.
BOOTSTRAPS = ("argocd", "argocd/local")

# What a reader of a base can't expect to hold: it is no overlay, and its Secrets are somebody else's.
NOT_FOR_THE_BASE = {"references", "namespaces"}


class Report:
    """Counts what it prints."""

    def __init__(self):
        self.passed = self.failed = self.skipped = 0

    def check(self, what, findings):
        try:
            findings = list(findings)
        except NotYet as reason:
            self.skipped += 1
            print(f"skipped  {what}: {reason}")
            return
        except Missing as reason:
            findings = [reason]
        if not findings:
            self.passed += 1
            return
        self.failed += 1
        print(f"FAILED   {what}")
        for finding in findings:
            print(f"         {finding}")


def kustomizations():
    yield "k8s"
    for folder in ("overlays", "tests"):
        for path in sorted((ROOT / "kustomize" / folder).iterdir()):
            yield f"kustomize/{folder}/{path.name}"


def rules_of(objects):
    return [(name, rule) for name, rule in RULES.items() if objects.name != "k8s" or name not in NOT_FOR_THE_BASE]


def broken(rendered, report):
    """Each rule has samples that it must catch, and each sample breaks something."""
    caught = set()
    for sample in yaml.safe_load((HERE / "broken.yaml").read_text()):
        what = f"broken sample: {sample['what']}"
        documents = copy.deepcopy(rendered[sample.get("in", "kustomize/overlays/local")].documents)
        kind, name = sample["object"].split("/")
        hit = [one for one in documents if one["kind"] == kind and is_called(one, name, sample.get("holding"))]
        if not hit:
            report.check(what, [f"there is no {sample['object']}"])
            continue
        if sample.get("remove"):
            documents = [one for one in documents if one is not hit[0]]
        else:
            changed = jsonpatch.apply_patch(hit[0], sample["patch"])
            documents = [changed if one is hit[0] else one for one in documents]
        objects = Objects(sample.get("in", "kustomize/overlays/local"), documents)
        rule = sample["rule"]
        try:
            if rule == "schema":
                found = [finding for one in documents for finding in schemas.findings(one)]
            elif rule == "configuration":
                found = list(programs.configuration(objects))
            elif rule == "commands":
                found = list(programs.commands(objects))
            elif rule == "metrics":
                found = list(programs.metrics(objects))
            elif rule == "argo":
                found = list(argo(objects, rendered))
            elif rule == "delivered":
                found = list(delivered({**rendered, objects.name: objects}))
            else:
                found = list(RULES[rule](objects))
        except Missing as reason:
            report.check(what, [reason])
            continue
        caught.add(rule)
        seen = any(sample.get("says", "") in finding for finding in found)
        report.check(what, [] if seen else [f"the rule {rule} does not see it"])
        if os.environ.get("VERBOSE"):
            print(f"caught   {sample['what']}: {found[:1]}")
    report.check("every rule has a broken sample", sorted(RULES.keys() - caught))


def is_called(one, name, holding):
    """Generated objects have a hash behind their name; of several, `holding` names a key of the one that is meant."""
    rest = one["metadata"]["name"].removeprefix(name)
    return (rest == "" or re.fullmatch("-[a-z0-9]{10}", rest)) and (not holding or holding in one["data"])


def argo(objects, rendered):
    """Each application's path exists, and its project allows all that is in it and nothing that is nowhere."""
    (project,) = objects.of("AppProject")
    name, project = project["metadata"]["name"], project["spec"]
    spaces = {one["namespace"] for one in project["destinations"]}
    allowed = {(one["group"], one["kind"]) for one in project["namespaceResourceWhitelist"]}
    allowed_wide = {(one["group"], one["kind"]) for one in project["clusterResourceWhitelist"]}
    used, used_spaces = set(), set()
    for application in objects.of("Application"):
        spec = application["spec"]
        path, space = spec["source"]["path"], spec["destination"]["namespace"]
        used_spaces.add(space)
        if path not in rendered:
            yield f"{title(application)}: {path} does not exist, or does not build"
            continue
        if spec["source"]["repoURL"] not in project["sourceRepos"]:
            yield f"{title(application)}: the project does not allow {spec['source']['repoURL']}"
        if space not in spaces or spec["project"] != name:
            yield f"{title(application)}: the project does not allow {space}"
        if application["metadata"]["namespace"] != "argocd":
            yield f"{title(application)}: must lie in argocd"
        options = set(spec["syncPolicy"].get("syncOptions", []))
        for option in {"ServerSideApply=true", "PruneLast=true", "ApplyOutOfSyncOnly=true"} - options:
            yield f"{title(application)}: wants {option}"
        if spec["syncPolicy"].get("automated") != {"prune": True, "selfHeal": True}:
            yield f"{title(application)}: must prune and heal by itself"
        if "backoff" not in spec["syncPolicy"].get("retry", {}):
            yield f"{title(application)}: wants a retry that backs off"
        for one in rendered[path].documents:
            kind = (one["apiVersion"].rpartition("/")[0], one["kind"])
            used.add(kind)
            if kind not in allowed | allowed_wide:
                yield f"{title(application)}: the project does not allow {title(one)}"
            if one["metadata"].get("namespace", one["metadata"]["name"]) != space:
                yield f"{title(application)}: {title(one)} is not in {space}"
    for group, kind in (allowed | allowed_wide) - used:
        yield f"the project allows {group}/{kind}, and nothing needs it"
    for space in spaces - used_spaces:
        yield f"the project allows {space}, and nothing goes there"


def delivered(rendered):
    """Each overlay has one application."""
    paths = [one["spec"]["source"]["path"] for bootstrap in BOOTSTRAPS for one in rendered[bootstrap].of("Application")]
    for path in rendered:
        if path.startswith("kustomize/overlays/") and paths.count(path) != 1:
            yield f"{paths.count(path)} applications deliver {path}"


def version(objects):
    """The base is of the version that is built."""
    built = next(line for line in (ROOT / "Cargo.toml").read_text().splitlines() if line.startswith("version = "))
    image = objects.api().containers[0]["image"]
    if not image.endswith(":" + built.split('"')[1]):
        yield f"{image}: Cargo.toml says {built}"


def main():
    report, rendered = Report(), {}
    for path in [*kustomizations(), *BOOTSTRAPS]:
        try:
            rendered[path] = Objects(path, programs.render(path))
            report.check(f"{path} renders", [])
        except ValueError as error:
            report.check(f"{path} renders", [error])
    for path, objects in rendered.items():
        for one in objects.documents:
            report.check(f"{path}: {title(one)}: schema", schemas.findings(one))
        if path in BOOTSTRAPS:
            report.check(f"{path}: labels", RULES["labels"](objects))
            report.check(f"{path}: fits what it delivers", argo(objects, rendered))
            continue
        for name, rule in rules_of(objects):
            report.check(f"{path}: {name}", rule(objects))
        report.check(f"{path}: configuration", programs.configuration(objects))
        report.check(f"{path}: commands", programs.commands(objects))
    report.check("every overlay is delivered", delivered(rendered))
    report.check("k8s: version", version(rendered["k8s"]))
    watched = rendered["kustomize/overlays/production"]
    report.check("alerts and their tests", programs.prometheus_rules(watched))
    report.check("metrics that alerts and the dashboard ask for", programs.metrics(watched))
    for check in (programs.hadolint, programs.yamllint, programs.shell, programs.readmes):
        report.check(check.__name__, check())
    broken(rendered, report)
    print(f"{report.passed} passed, {report.failed} failed, {report.skipped} skipped")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
