"""The project's own rules over rendered manifests: what the API server refuses, or a cluster suffers, and no schema knows.

A rule is a function from the objects to sentences, one for each thing that is wrong. `broken.yaml` has a sample for each.
"""

RULES = {}


def rule(function):
    """Registers a rule under its function's name, with dashes."""
    RULES[function.__name__.replace("_", "-")] = function
    return function


from . import addresses, availability, delivery, network, pods, references  # noqa: E402, F401
