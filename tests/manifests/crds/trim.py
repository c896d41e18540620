"""Makes the JSON Schemas of this folder out of CustomResourceDefinitions: `python3 trim.py CRD.yaml…`

What only explains is left out. Objects whose fields the API server would prune get `additionalProperties: false`, so
that a misspelt field, which the API server drops without a word, is found.
"""

import json
import pathlib
import sys

import yaml

KEPT = {
    "type", "properties", "items", "required", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength",
    "minItems", "maxItems", "additionalProperties", "anyOf", "oneOf", "allOf", "not", "format",
}


def schema(node: dict) -> dict:
    out = {}
    for key, value in node.items():
        if key not in KEPT:
            continue
        if key == "properties":
            value = {name: schema(below) for name, below in value.items()}
        elif key in ("items", "not") or (key == "additionalProperties" and isinstance(value, dict)):
            value = schema(value)
        elif key in ("anyOf", "oneOf", "allOf"):
            value = [schema(below) for below in value]
        out[key] = value
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    open_ended = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
    if node.get("type") == "object" and "properties" in node and not open_ended:
        out["additionalProperties"] = False
    if node.get("nullable") and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    return out


def main() -> None:
    here = pathlib.Path(__file__).parent
    for file in sys.argv[1:]:
        for crd in yaml.safe_load_all(pathlib.Path(file).read_text()):
            if not crd or crd.get("kind") != "CustomResourceDefinition":
                continue
            for version in (version for version in crd["spec"]["versions"] if version["served"]):
                made = schema(version["schema"]["openAPIV3Schema"])
                made["properties"]["metadata"] = {"type": "object"}
                made["properties"].pop("status", None)
                name = f"{crd['spec']['group']}_{crd['spec']['names']['kind']}_{version['name']}.json"
                (here / name).write_text(json.dumps(made, separators=(",", ":")) + "\n")
                print(name)


if __name__ == "__main__":
    main()
