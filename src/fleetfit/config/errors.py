"""What is wrong with a file of keys, in words: one line for each problem."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fleetfit.core.records import Record


def _known_keys(model: type[BaseModel]) -> list[str]:
    return list(model.model_fields)


def _model_at(path: tuple[str | int, ...], root: type[BaseModel]) -> type[BaseModel] | None:
    """The pydantic model that holds the key at this path, for the nearest-key hint."""
    model = root
    for part in path[:-1]:
        if isinstance(part, int):
            continue
        if part not in model.model_fields:
            return None
        inner = [a for a in _parts(model.model_fields[part].annotation) if issubclass(a, BaseModel)]
        if not inner:
            return None
        model = inner[0]
    return model


def _parts(annotation: Any) -> list[type]:
    """The classes that a type is made of."""
    if arguments := get_args(annotation):
        return [part for argument in arguments for part in _parts(argument)]
    return [annotation] if isinstance(annotation, type) else []


RETIRED = {  # keys of earlier versions -> what took their place
    "refine.prior_power": "the class prior's numbers are chosen by pooled validation (refine.prior_estimate)",
    "refine.prior_shares": "the class prior starts from the public data's shares (refine.prior_estimate)",
    "refine.prior_scoring": "ways to ship are always scored leaving one sample out (refine.prior_estimate)",
}

RULES = {
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "less_than": "must be < {lt:g}",
    "less_than_equal": "must be <= {le:g}",
    "finite_number": "must be finite",
    "literal_error": "must be one of {expected}",
    "too_short": "must have at least {min_length} item",
    "string_pattern_mismatch": "must be letters, digits, '-', '_' and '.', the first a letter or digit",
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "tuple_type": "must be a list",
    "dict_type": "must be a table of keys",
    "model_type": "must be a table of keys",
}


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line per problem of a file whose keys are those of ``root``: key, rule, what it got, and the nearest key."""
    rules: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for problem in error.errors():
        path = tuple(p for p in problem["loc"] if not (isinstance(p, str) and ("[" in p or p.startswith("function-"))))
        key, kind, value = ".".join(map(str, path)), problem["type"], problem.get("input")
        if kind == "too_short" and value:
            continue  # the list is not short: its items are bad, and that is said
        if kind == "extra_forbidden":
            model = _model_at(path, root)
            known = _known_keys(model) if model else []
            near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
            rule = f"is no key any more; {RETIRED[key]}" if key in RETIRED else f"is an unknown key; {hint}"
        elif kind == "missing":
            rule = "must be given"
        else:
            known_rule = RULES.get(kind, "").format(**problem.get("ctx", {})).replace(" or '", ", '")
            rule = known_rule or problem["msg"].removeprefix("Value error, ")
            if ", got " not in rule and not isinstance(value, (dict, Record)):
                got[key] = f", got {value!r}"
        earlier = rules.setdefault(key, [])
        if rule.startswith("must be one of ") and earlier and earlier[-1].startswith("must be one of "):
            earlier[-1] += f", {rule.removeprefix('must be one of ')}"
        elif rule not in earlier:
            earlier.append(rule)
    lines = []
    for key, broken in rules.items():
        for rule in broken:
            colon = "" if rule.startswith(("must ", "is ")) else ":"
            lines.append(f"{key}{colon} {rule}{got.get(key, '')}" if key else rule)
    return "\n".join(lines)
