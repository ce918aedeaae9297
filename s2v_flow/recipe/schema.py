"""The JSON Schema of a recipe, for editors: generated from the node kinds, in draft 7 for yaml-language-server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import NAME
from s2v_flow.quality import GATES
from s2v_flow.recipe.layers import LANGUAGE_VERSION

Schema = dict[str, Any]

_PARAMETER = rf"^\$params\.{NAME}$"
_INTERPOLATED = rf"\$\{{params\.{NAME}\}}"
_NAMES = {"pattern": f"^{NAME}$"}


def recipe_schema(kinds: Mapping[str, type[Node]]) -> Schema:
    """Return the schema of a recipe file.

    `#/definitions/override` is the schema of an override file (`-f`). A recipe that extends another may leave out what
    its base has, as profiles may: there, nodes need neither a kind nor their required fields.
    """
    scalar = {"type": ["string", "number", "boolean", "null"]}
    definitions: Schema = {
        "parameter": {"type": "string", "pattern": _PARAMETER, "description": "A parameter's value."},
        "interpolated": {"type": "string", "pattern": _INTERPOLATED, "description": "Text with parameters."},
        "params": {
            "type": ["object", "null"],
            "propertyNames": _NAMES,
            "additionalProperties": {"anyOf": [scalar, {"type": "array", "items": scalar}]},
        },
    }
    for name, kind in kinds.items():
        definitions.update(_definitions(name, kind))
    definitions["node"] = _node(kinds)
    definitions["node_part"] = _node_part(kinds, definitions)
    definitions["profile"] = {
        "type": ["object", "null"],
        "properties": {
            "description": {"type": ["string", "null"], "description": "What the profile is for."},
            "params": _reference("params", "Parameters that change."),
            "nodes": _map_of("node_part", "Nodes, or the fields of nodes that change."),
        },
        "additionalProperties": False,
    }
    definitions["override"] = _file(is_recipe=False)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "s2vflow recipe",
        **_file(is_recipe=True),
        "definitions": definitions,
    }


def _file(*, is_recipe: bool) -> Schema:
    part = _map_of("node_part", "Nodes, or the fields of nodes that change.")
    properties: Schema = {
        "s2vflow": {"const": LANGUAGE_VERSION, "description": "The version of the recipe language."},
        "description": {"type": ["string", "null"], "description": "What the recipe makes, in a sentence."},
        "extends": {
            "type": ["string", "null"],
            "description": "Another recipe, by its path relative to this file, on which this one is laid.",
        },
        "params": _reference(
            "params", "The knobs: named values, used as $params.NAME and changed by --set NAME=VALUE."
        ),
        "profiles": _map_of("profile", "Named sets of changes, chosen with -p NAME."),
        "matrix": _matrix(),
        "require": {
            "type": ["object", "null"],
            "description": "What every video's figures must be; where they are not, the run ends with exit code 11.",
            "properties": {
                name: {"type": "number", "minimum": 0, "description": about[:1].upper() + about[1:] + "."}
                for name, about in GATES.items()
            },
            "additionalProperties": False,
        },
    }
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    if not is_recipe:
        properties["nodes"] = part
        return schema
    properties["nodes"] = {"description": "The nodes of the graph, by name."}
    schema["required"] = ["s2vflow"]
    whole = {**_map_of("node", "The nodes of the graph, by name."), "type": "object", "minProperties": 1}
    schema["if"] = {"required": ["extends"]}
    schema["then"] = {"properties": {"nodes": part}}
    schema["else"] = {"properties": {"nodes": whole}, "required": ["nodes"]}
    return schema


def _matrix() -> Schema:
    items = {"type": "array", "items": {"type": "object", "minProperties": 1}}
    return {
        "type": ["object", "null"],
        "description": "Values to run the recipe with, in all combinations: path (as in --set) -> list of values.",
        "properties": {
            "include": {**items, "description": "Cells to add, or values to add to the cells that they fit."},
            "exclude": {**items, "description": "Combinations to leave out: cells that have all of an item's values."},
        },
        "additionalProperties": {"type": "array", "minItems": 1},
    }


def _map_of(definition: str, description: str) -> Schema:
    return {
        "type": ["object", "null"],
        "description": description,
        "propertyNames": _NAMES,
        "additionalProperties": {"$ref": f"#/definitions/{definition}"},
    }


def _reference(definition: str, description: str) -> Schema:
    """Return a described reference; draft 7 ignores what stands beside `$ref`."""
    return {"description": description, "allOf": [{"$ref": f"#/definitions/{definition}"}]}


def _node(kinds: Mapping[str, type[Node]]) -> Schema:
    rules = []
    for name, kind in kinds.items():
        required = [field for field, info in kind.model_fields.items() if info.is_required()]
        fields = {"allOf": [{"$ref": f"#/definitions/{name}"}], "required": required}
        rules.append({"if": _is_kind(name), "then": fields})
    return {"type": "object", "properties": {"kind": _kind(kinds)}, "required": ["kind"], "allOf": rules}


def _node_part(kinds: Mapping[str, type[Node]], definitions: Schema) -> Schema:
    """Return the change of a node: any field that a node of its kind, or of some kind if it names none, can have."""
    shared: dict[str, list[Schema]] = {}
    for name in kinds:
        for field, schema in definitions[name]["properties"].items():
            choices = shared.setdefault(field, [])
            if field != "kind" and schema not in choices:
                choices.append(schema)
    properties = {field: choices[0] if len(choices) == 1 else {"anyOf": choices} for field, choices in shared.items()}
    properties["kind"] = _kind(kinds)
    rules = [{"if": _is_kind(name), "then": {"$ref": f"#/definitions/{name}"}} for name in kinds]
    return {"type": "object", "properties": properties, "additionalProperties": False, "allOf": rules}


def _kind(kinds: Mapping[str, type[Node]]) -> Schema:
    return {
        "description": "What the node does.",
        "enum": list(kinds),
        "enumDescriptions": [summary(kind) for kind in kinds.values()],  # shown by editors, ignored by validators
    }


def _is_kind(name: str) -> Schema:
    return {"properties": {"kind": {"const": name}}, "required": ["kind"]}


def summary(kind: type[Node]) -> str:
    """Return what a kind does, on one line."""
    return " ".join((kind.__doc__ or "").split())


def _definitions(name: str, kind: type[Node]) -> Schema:
    """Return the fields of a kind, none of them required, and the definitions that they refer to."""
    generated = kind.model_json_schema(ref_template="#/definitions/{model}")
    inputs = kind.input_ports()
    definitions: Schema = {}
    for model, schema in generated.get("$defs", {}).items():
        properties = {field: _with_parameters(_tidy(value)) for field, value in schema["properties"].items()}
        definitions[model] = {**_tidy(schema), "properties": properties}
    fields: Schema = {"kind": {"const": name, "description": summary(kind)}}
    for field, schema in generated.get("properties", {}).items():
        tidy = _tidy(schema)
        is_input = field in inputs
        fields[field] = {**tidy, "not": {"$ref": "#/definitions/parameter"}} if is_input else _with_parameters(tidy)
    definitions[name] = {
        "type": "object",
        "title": name,
        "description": summary(kind),
        "properties": fields,
        "additionalProperties": False,
    }
    return definitions


def _tidy(schema: Any) -> Any:
    """Return a schema without the titles that pydantic makes of names, and with nothing beside a `$ref`."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    tidy = {key: _tidy(value) for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
    if "$ref" in tidy and len(tidy) > 1:
        tidy["allOf"] = [{"$ref": tidy.pop("$ref")}]
    return tidy


def _with_parameters(schema: Schema) -> Schema:
    """Let a field also be given as a parameter: `$params.x` for any value, text with `${params.x}` in it for text."""
    if schema.get("type") == "string" and not schema.keys() & {"pattern", "enum", "const"}:
        return schema
    about: Schema = {key: schema[key] for key in ("description", "default") if key in schema}
    value = {key: item for key, item in schema.items() if key not in about}
    choices = [_items_with_parameters(choice) for choice in value.get("anyOf", [value])]
    choices.append({"$ref": "#/definitions/parameter"})
    if schema.get("type") == "string":
        choices.append({"$ref": "#/definitions/interpolated"})
    return {**about, "anyOf": choices}


def _items_with_parameters(schema: Schema) -> Schema:
    items = schema.get("items")
    return schema if items is None or "$ref" in items else {**schema, "items": _with_parameters(items)}
