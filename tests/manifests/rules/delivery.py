"""Namespaces, and what Argo CD does with the objects."""

from objects import title

from . import rule

CLUSTER_WIDE = ("Namespace",)


@rule
def namespaces(objects):
    own = objects.of("Namespace")
    if objects.name == "k8s":
        return
    if len(own) != 1:
        yield f"{len(own)} Namespaces; an overlay has one"
        return
    name = own[0]["metadata"]["name"]
    for one in objects.documents:
        if one["kind"] not in CLUSTER_WIDE and one["metadata"].get("namespace") != name:
            yield f"{title(one)}: is not in {name}"
    if own[0]["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
        yield f"Namespace/{name}: does not enforce restricted pods"


@rule
def waves(objects):
    """Whatever a hook needs is there before it runs; nothing that holds data is pruned."""
    def wave(one):
        return int(one["metadata"].get("annotations", {}).get("argocd.argoproj.io/sync-wave", "0"))

    for job in objects.of("Job"):
        annotations = job["metadata"].get("annotations", {})
        hook = annotations.get("argocd.argoproj.io/hook")
        if hook not in ("Sync", "PostSync"):
            yield f"{title(job)}: must be a Sync or PostSync hook: before that its ConfigMap is not there"
            continue
        if annotations.get("argocd.argoproj.io/hook-delete-policy") != "BeforeHookCreation":
            yield f"{title(job)}: the old one must go before the new one comes: BeforeHookCreation"
        if not job["spec"].get("ttlSecondsAfterFinished"):
            yield f"{title(job)}: without Argo CD nobody deletes it, and it can't be changed"
        if hook == "PostSync":
            continue
        for one in objects.of("ConfigMap", "Secret", "ExternalSecret", "SealedSecret", "ServiceAccount", "Cluster"):
            if wave(one) >= wave(job) and "dashboard" not in one["metadata"]["name"]:
                yield f"{title(one)}: comes no earlier than {title(job)}"
        if wave(job) >= wave(objects.get("Deployment", "cache-aside")):
            yield f"{title(job)}: comes no earlier than the pods that need it"
    for one in objects.of("Namespace", "Cluster"):
        if "Prune=false" not in one["metadata"].get("annotations", {}).get("argocd.argoproj.io/sync-options", ""):
            yield f"{title(one)}: a commit that loses it would delete the data"
