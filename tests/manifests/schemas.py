"""Whether objects are what the API server would take: Kubernetes' own kinds by version, the others by their definitions."""

import json
import pathlib

import jsonschema
import kubernetes_validate

HERE = pathlib.Path(__file__).parent
# The oldest and the newest that are supported; docs/deploy.md says so too.
VERSIONS = ("1.33", "1.37")


def findings(one: dict) -> list:
    if one["kind"] == "Kustomization":
        return []
    group, _, version = one["apiVersion"].rpartition("/")
    found = sorted((HERE / "crds").rglob(f"{group}_{one['kind']}_{version}.json"))
    if found:
        validator = jsonschema.Draft202012Validator(json.loads(found[0].read_text()))
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(one)]
    out = []
    for kubernetes in VERSIONS:
        try:
            kubernetes_validate.validate(one, kubernetes, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(str(step) for step in error.path)
            out.append(f"Kubernetes {kubernetes}: {path}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError:
            out.append(f"Kubernetes {kubernetes}: no schema for {one['apiVersion']} {one['kind']}")
    return out
