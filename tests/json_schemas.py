"""Fifty JSON schemas of the kinds that people write for models; their values are short."""

from __future__ import annotations

from typing import Any

WORD = {"type": "string", "maxLength": 8}
COUNT = {"type": "integer", "minimum": 0, "maximum": 99}
FLAG = {"type": "boolean"}


def obj(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """An object of these properties and no others, all of them required unless said otherwise."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def array(items: Any, most: int = 3, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def text(pattern: str | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "string", **({} if pattern is None else {"pattern": pattern}), **more}


TREE = {
    "$defs": {"node": obj(["name"], name=WORD, children=array({"$ref": "#/$defs/node"}, 1))},
    "$ref": "#/$defs/node",
}
LINKED = {"$defs": {"cell": obj(value=COUNT, rest={"anyOf": [{"$ref": "#/$defs/cell"}, {"type": "null"}]})}}
MONEY = obj(
    amount={"type": "number", "minimum": 0, "maximum": 1000, "multipleOf": 0.01}, currency={"enum": ["EUR", "USD"]}
)

SCHEMAS: dict[str, dict[str, Any]] = {
    "person": obj(name=WORD, age=COUNT),
    "optional": obj(["id"], id=COUNT, note=WORD, seen=FLAG),
    "nested": obj(user=obj(name=WORD, address=obj(street=WORD, number=COUNT))),
    "enum": obj(mood={"enum": ["happy", "sad", "neutral"]}),
    "mixed enum": {"enum": ["a", 1, 2.5, None, True, {"x": [1]}]},
    "const": obj(version={"const": 2}, kind={"const": "reply"}),
    "const object": {"const": {"a": [1, {"b": None}]}},
    "boolean": FLAG,
    "null": {"type": "null"},
    "bounded integer": {"type": "integer", "minimum": -20, "maximum": 300},
    "exclusive number": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1, "multipleOf": 0.125},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 1000},
    "negative": obj(degrees={"type": "integer", "minimum": -90, "maximum": -1}),
    "short string": text(minLength=2, maxLength=5),
    "plate": text(r"^[A-Z]{2}-[0-9]{3}$"),
    "semver": text(r"^(0|[1-9][0-9]?)\.(0|[1-9][0-9]?)\.(0|[1-9][0-9]?)$"),
    "unicode pattern": text(r"^[äöüß漢]{1,6}$"),
    "escapes": text(r'^["\\/]{1,4}$'),
    "date": obj(day=text(format="date")),
    "date-time": obj(at=text(format="date-time")),
    "time": text(format="time"),
    "uuid": obj(id=text(format="uuid")),
    "ipv4": text(format="ipv4"),
    "ipv6": text(format="ipv6"),
    "array": array(COUNT, 5, 2),
    "array of enums": array({"enum": ["red", "green", "blue"]}, 4, 1),
    "matrix": array(array(COUNT, 2, 2), 2, 2),
    "tuple": {"type": "array", "prefixItems": [WORD, COUNT, FLAG], "items": False, "minItems": 3},
    "tuple and more": {"type": "array", "prefixItems": [FLAG], "items": COUNT, "minItems": 2, "maxItems": 4},
    "empty array": array(WORD, 0),
    "array of objects": array(obj(key=WORD, value=COUNT), 3, 1),
    "type list": obj(nickname={"type": ["string", "null"], "maxLength": 6}),
    "nullable by anyOf": obj(end={"anyOf": [text(format="date"), {"type": "null"}]}),
    "anyOf of types": {"anyOf": [COUNT, WORD, array(FLAG, 2)]},
    "anyOf of objects": {
        "anyOf": [obj(kind={"const": "cat"}, lives=COUNT), obj(kind={"const": "dog"}, tricks=array(WORD, 2))]
    },
    "oneOf by a tag": {"oneOf": [obj(op={"const": "add"}, by=COUNT), obj(op={"const": "clear"})]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    "$defs": {
        "$defs": {"point": obj(x=COUNT, y=COUNT)},
        **obj(start={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"}),
    },
    "definitions": {"definitions": {"tag": {"enum": ["a", "b"]}}, **array({"$ref": "#/definitions/tag"}, 3, 1)},
    "tree": TREE,
    "linked list": {**LINKED, **obj(head={"$ref": "#/$defs/cell"})},
    "map": {"type": "object", "patternProperties": {"^x_[a-c]$": FLAG}, "additionalProperties": False},
    "some names": {**obj(id=COUNT), "patternProperties": {"^[a-h]{1,4}$": FLAG}, "maxProperties": 3},
    "money": MONEY,
    "described": {
        "title": "Answer",
        "description": "one",
        **obj(ok={**FLAG, "description": "whether", "default": True}),
    },
    "classification": obj(
        label={"enum": ["spam", "ham"]}, confidence={"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.01}
    ),
    "extraction": obj(
        invoice=text(r"^INV-[0-9]{4}$"), date=text(format="date"), lines=array(obj(item=WORD, price=MONEY), 2, 1)
    ),
    "tool call": obj(name={"const": "get_weather"}, arguments=obj(["city"], city=WORD, unit={"enum": ["C", "F"]})),
    "steps": obj(steps=array(obj(explanation=WORD, output=WORD), 2, 1), final=WORD),
    "unusual names": obj(**{"a b": FLAG, 'quo"te': COUNT, "é漢": FLAG, "$ref-not": FLAG}),
}
