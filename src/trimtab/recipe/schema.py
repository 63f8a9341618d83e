"""The JSON schema of a recipe, for editors: `trimtab recipe --schema > recipe.schema.json`.

pydantic derives it from the fields. Three places take shorter or further forms than their fields say, since validators turn
these into the fields' values first: a method may be its name alone, `data` a path or a list of them, and a grid a k-quant.
The schema takes every recipe that `Recipe` takes; what depends on several keys at once only `Recipe` checks.
"""

import json
from typing import Any

from pydantic import TypeAdapter

from trimtab import methods
from trimtab.methods.base import Method
from trimtab.quant.two_level import TWO_LEVEL
from trimtab.recipe.explain import documented
from trimtab.recipe.recipe import Recipe

_TEXT = {"type": "string"}


def schema() -> dict[str, Any]:
    """The schema, in the draft of 2020-12."""
    made = Recipe.model_json_schema()
    kinds, keys = made["$defs"], made["properties"]
    names = sorted(name for method in methods.ALL for name in (method.name, *method.aliases))
    about = keys["method"]["description"]
    keys["method"] = {"description": about, "anyOf": [{"enum": names}, *map(_method, methods.ALL)]}
    del kinds["Method"]
    k_quant = {
        "type": "object",
        "description": "A k-quant of GGUF, with its own bits, group and zero.",
        "properties": {"kquant": {"enum": list(TWO_LEVEL)}, "range": kinds["Grid"]["properties"]["range"]},
        "required": ["kquant"],
        "additionalProperties": False,
    }
    kinds["Rule"]["properties"]["grid"]["anyOf"].append(k_quant)
    for kind in ("Grid", "CodebookGrid"):
        kinds[kind]["properties"]["group"]["anyOf"].append({"const": "channel"})
    kinds["CodebookGrid"]["required"] = ["codebook"]
    sources = {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT, {"$ref": "#/$defs/SourceBlock"}]}}
    kinds["DataBlock"]["properties"]["path"]["anyOf"] = [_TEXT, sources]
    keys["data"]["anyOf"] += [_TEXT, sources]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def schema_text() -> str:
    """The schema as the text of a JSON file."""
    return json.dumps(schema(), indent=2) + "\n"


def _method(kind: type[Method]) -> dict[str, Any]:
    made = TypeAdapter(kind).json_schema()
    for base in (Method, kind):
        for name, _, said in documented(base):
            made["properties"][name]["description"] = said
    made["properties"] = {"name": {"enum": [kind.name, *kind.aliases]}, **made["properties"]}
    return made | {"required": ["name"], "additionalProperties": False, "title": kind.name}
