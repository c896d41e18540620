"""Everything that is named exists: ConfigMaps, Secrets and their keys, accounts, variables."""

import re

from objects import title

from . import rule


@rule
def references(objects):
    for pod in objects.pods():
        account = pod.spec.get("serviceAccountName")
        if account and not objects.get("ServiceAccount", account):
            yield f"{pod.owner}: ServiceAccount {account} does not exist"
        for volume in pod.spec.get("volumes", []):
            name = volume.get("configMap", {}).get("name")
            if name and not objects.get("ConfigMap", name):
                yield f"{pod.owner}: ConfigMap {name} does not exist"
        for container in pod.all_containers:
            yield from variables(objects, pod, container)
    used = {
        reference
        for pod in objects.pods()
        for container in pod.all_containers
        for one in container.get("env", [])
        if (reference := one.get("valueFrom", {}).get("secretKeyRef", {}).get("name"))
    }
    for store in objects.of("ObjectStore"):
        for reference in store["spec"]["configuration"]["s3Credentials"].values():
            used.add(reference["name"])
            if reference["key"] not in objects.secrets().get(reference["name"], {}):
                yield f"{title(store)}: Secret {reference['name']} has no key {reference['key']}"
    # What nobody reads is a leftover, except where a store brings more than this combination needs.
    for secret in objects.of("Secret"):
        if secret["metadata"]["name"] not in used:
            yield f"{title(secret)}: nobody reads it"


def variables(objects, pod, container):
    known = set()
    for source in container.get("envFrom", []):
        name = source.get("configMapRef", {}).get("name")
        config = objects.get("ConfigMap", name)
        if not config:
            yield f"{pod.owner}: ConfigMap {name} does not exist"
        known |= (config or {}).get("data", {}).keys()
    for one in container.get("env", []):
        reference = one.get("valueFrom", {}).get("secretKeyRef")
        if reference and reference["key"] not in objects.secrets().get(reference["name"], {}):
            yield f"{pod.owner}: Secret {reference['name']} with a key {reference['key']} does not exist"
        # Kubernetes leaves what it doesn't know as it stands, and the program gets the dollar and the brackets.
        for name in re.findall(r"\$\((\w+)\)", one.get("value", "")):
            if name not in known:
                yield f"{pod.owner}: $({name}) is not set before {one['name']}"
        known.add(one["name"])
    for text in container.get("command", []) + container.get("args", []):
        for name in re.findall(r"\$\((\w+)\)", text):
            if name not in known:
                yield f"{pod.owner}: $({name}) is not set"


@rule
def no_passwords(objects):
    """Only what says that it is for a laptop or a test may hold one."""
    if objects.name.startswith(("kustomize/overlays/local", "kustomize/tests/")):
        return
    for secret in objects.of("Secret"):
        yield f"{title(secret)}: a Secret with its content lies in Git"
    for config in objects.of("ConfigMap"):
        for key, text in config.get("data", {}).items():
            if re.search(r"://[^\s/:@]*:[^\s/@${]+@", text):
                yield f"{title(config)}: {key} holds a URL with a password"
