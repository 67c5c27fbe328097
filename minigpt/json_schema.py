"""A JSON Schema as a regular expression: whatever matches this is JSON that the schema describes.

Not all such JSON matches: properties come in the order of the schema and no others beside them, between tokens there is
one space at most, characters are not written as \\u, numbers have up to 15 digits, and what a schema leaves open is a
number, text, true, false, null, or an array or object of these. What cannot be kept to is refused.
"""

from __future__ import annotations

import json
import re

from minigpt.patterns import Automaton, TooLarge

DIGITS = 15
"""Of a whole number, at most; larger ones are not exact everywhere."""
LONGEST_PATTERN = 1_000_000
"""Characters of a regular expression, which doubles with each level of arrays."""
LONGEST = 1000
"""Characters of a text, or items, that a bound may allow."""
STRING = {"minLength", "maxLength", "pattern", "format"}
NUMBER = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
ARRAY = {"items", "minItems", "maxItems"}
OBJECT = {"properties", "required", "additionalProperties"}
KEYWORDS = {"type", "enum", "const", "anyOf", "$ref", *STRING, *NUMBER, *ARRAY, *OBJECT}
REMARKS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id",
           "$comment", "$defs", "definitions"}
"""Keywords that forbid nothing."""
MENDS = {"oneOf": "write anyOf", "allOf": "write one schema that says all of it"}
CHARACTER = r'(?:[^"\\\x00-\x1f\x7f]|\\["\\/bfnrt])'
DATE = ("[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
        "|02-(?:0[1-9]|1[0-9]|2[0-8]))")
TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
FORMATS = {"date": DATE, "time": TIME, "date-time": f"{DATE}T{TIME}",
           "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"}
COMMA = " ?, ?"
WHOLE = f"(?:0|[1-9][0-9]{{0,{DIGITS - 1}}})"


def to_regex(schema: str) -> str:
    """The regular expression. Raises ValueError naming the place in the schema and the mend."""
    try:
        tree = json.loads(schema, parse_constant=_no_number)
        return _Writer(tree).value(tree, "#", ())
    except json.JSONDecodeError as error:
        raise ValueError(f"json_schema is no JSON: {error}") from None
    except RecursionError:
        raise ValueError("json_schema nests too deep; write it with fewer levels") from None


def _no_number(name):
    raise ValueError(f"json_schema: {name} is no number of JSON; write another")


class _Writer:
    def __init__(self, root):
        self.root = root

    def value(self, schema, place, refs):
        """What describes a value; `refs` are those that were followed to get here."""
        written = self.written(schema, place, refs)
        if len(written) > LONGEST_PATTERN:
            raise TooLarge(f"json_schema, {place}: describes too much; nest less deep")
        return written

    def written(self, schema, place, refs):
        if schema is True or schema == {}:
            return _any_value()
        if not isinstance(schema, dict):
            raise ValueError(f"json_schema, {place}: {json.dumps(schema)} describes no value; write an object")
        for key in schema:
            if key not in KEYWORDS | REMARKS:
                raise ValueError(f"json_schema, {place}: {key!r} is not supported; {MENDS.get(key, 'leave it out')}")
        if "$ref" in schema:
            return self.reference(schema, place, refs)
        if "anyOf" in schema:
            self.alone("anyOf", schema, place)
            return _either(self.value(each, f"{place}/anyOf/{number}", refs)
                           for number, each in enumerate(self.listed(schema, "anyOf", place)))
        kinds = schema.get("type", self.implied(schema))
        kinds = kinds if isinstance(kinds, list) and (kinds or "type" not in schema) else [kinds]
        for kind in kinds:
            if not isinstance(kind, str) or kind not in TYPES:
                raise ValueError(f"json_schema, {place}: type {kind!r} is none of: {', '.join(TYPES)}")
        if "enum" in schema or "const" in schema:
            values = [schema["const"]] if "const" in schema else self.listed(schema, "enum", place)
            self.alone("const" if "const" in schema else "enum", schema, place, "type")
            values = [value for value in values if not kinds or any(_is_of(value, kind) for kind in kinds)]
            if not values:
                raise ValueError(f"json_schema, {place}: no value is of type {', '.join(kinds)}; change one of them")
            return _either(_literal(value, place) for value in values)
        return _either(TYPES[kind](self, schema, place, refs) for kind in kinds) if kinds else _any_value()

    def alone(self, key, schema, place, *others):
        beside = [other for other in schema if other in KEYWORDS - {key, *others}]
        if beside:
            raise ValueError(f"json_schema, {place}: {beside[0]!r} beside {key!r} is not supported; leave out one")

    def listed(self, schema, key, place):
        if not isinstance(schema[key], list) or not schema[key]:
            raise ValueError(f"json_schema, {place}: {key} is no list with values; write one")
        return schema[key]

    def implied(self, schema):
        """The types that keywords speak of, where none is given."""
        return [kind for kind, keys in (("string", STRING), ("integer", NUMBER), ("array", ARRAY), ("object", OBJECT))
                if keys & set(schema)]

    def reference(self, schema, place, refs):
        self.alone("$ref", schema, place)
        ref, found = schema["$ref"], self.root
        if ref in refs:
            raise ValueError(f"json_schema, {place}: {ref} leads back to itself; write out as many levels as you need")
        try:
            first, *keys = ref.split("/")
            for key in keys:
                found = found[key.replace("~1", "/").replace("~0", "~")]
        except (AttributeError, KeyError, TypeError):
            first = None
        if first != "#":
            raise ValueError(f"json_schema, {place}: there is no {ref!r} in this schema; write $defs and name one")
        return self.value(found, ref, (*refs, ref))

    def bounds(self, schema, low, high, place):
        """{low,high} of a repetition."""
        least, most = schema.get(low, 0), schema.get(high, "")
        for key, bound in ((low, least), (high, most or 0)):
            if type(bound) is not int or not 0 <= bound <= LONGEST:
                raise ValueError(f"json_schema, {place}: {key} = {bound!r} is no whole number from 0 to {LONGEST}")
        if most != "" and least > most:
            raise ValueError(f"json_schema, {place}: {low} = {least} is more than {high} = {most}")
        return least, most

    def string(self, schema, place, refs):
        given = [key for key in ("pattern", "format") if key in schema]
        if given:
            self.alone(given[0], schema, place, *(KEYWORDS - STRING))
        if "pattern" in schema:
            return f'"{self.pattern(schema["pattern"], place)}"'
        if "format" in schema:
            if schema["format"] not in list(FORMATS):
                raise ValueError(f"json_schema, {place}: format {schema['format']!r} is none of: {', '.join(FORMATS)}; "
                                 "write a pattern")
            return f'"{FORMATS[schema["format"]]}"'
        least, most = self.bounds(schema, "minLength", "maxLength", place)
        return f'"{CHARACTER}{{{least},{most}}}"'

    def pattern(self, pattern, place):
        """A pattern is searched for, so what is not anchored may have any text beside it."""
        if not isinstance(pattern, str):
            raise ValueError(f"json_schema, {place}: pattern = {json.dumps(pattern)} is no text; write one")
        begins, ends = pattern.startswith("^"), re.search(r"(?<!\\)(?:\\\\)*\$$", pattern) is not None
        inner = pattern[begins:len(pattern) - ends]
        try:
            ranges = [(low, high) for edges in Automaton(f"(?:{inner})").edges for low, high, _ in edges]
        except ValueError as error:
            raise ValueError(f"json_schema, {place}: {error}") from None
        if any(low < 32 or low <= ord(char) <= high for low, high in ranges for char in '"\\'):
            raise ValueError(f"json_schema, {place}: the pattern {pattern!r} may match a quote, a backslash or a "
                             "control character, which JSON writes otherwise; list what it may match, as [a-z ]")
        return f"{'' if begins else CHARACTER + '*'}(?:{inner}){'' if ends else CHARACTER + '*'}"

    def integer(self, schema, place, refs):
        if not NUMBER & set(schema):
            return f"-?{WHOLE}"
        low, high = -10**DIGITS + 1, 10**DIGITS - 1
        for key in NUMBER & set(schema):
            bound = schema[key]
            if type(bound) is not int:
                raise ValueError(f"json_schema, {place}: {key} = {json.dumps(bound)} is no whole number; write one")
            bound += (key == "exclusiveMinimum") - (key == "exclusiveMaximum")
            low, high = (max(low, bound), high) if "Min" in key or "min" in key else (low, min(high, bound))
        if low > high:
            raise ValueError(f"json_schema, {place}: no whole number of up to {DIGITS} digits is from {low} to {high}")
        negative = [f"-{part}" for part in _between(max(1, -high), -low)] if low < 0 else []
        return _either([*negative, *(_between(max(0, low), high) if high >= 0 else [])])

    def number(self, schema, place, refs):
        if given := NUMBER & set(schema):
            raise ValueError(f"json_schema, {place}: {min(given)!r} is supported of integers only; leave it out")
        return rf"-?{WHOLE}(?:\.[0-9]{{1,{DIGITS}}})?(?:[eE][+-]?[0-9]{{1,2}})?"

    def array(self, schema, place, refs):
        least, most = self.bounds(schema, "minItems", "maxItems", place)
        item = self.value(schema.get("items", True), f"{place}/items", refs)
        return _repeated(r"\[", item, least, most, r"\]")

    def object(self, schema, place, refs):
        properties, required = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties", True)
        if not isinstance(properties, dict) or not isinstance(required, list) or not all(
                isinstance(name, str) for name in required):
            raise ValueError(f"json_schema, {place}: properties are an object and required is a list of names; write "
                             "them so")
        properties = properties | {name: others for name in required if name not in properties}
        if not properties:
            if others is False:
                return r"\{ ?\}"
            value = self.value(others, f"{place}/additionalProperties", refs)
            return _repeated(r"\{", f'"{CHARACTER}*" ?: ?{value}', 0, "", r"\}")
        written = [(_literal(name, place) + " ?: ?"
                    + self.value(its, f"{place}/properties/{name}", refs), name in required)
                   for name, its in properties.items()]
        return rf"\{{ ?{_members(written)} ?\}}"


TYPES = {"string": _Writer.string, "integer": _Writer.integer, "number": _Writer.number, "array": _Writer.array,
         "object": _Writer.object, "boolean": lambda *_: "(?:true|false)", "null": lambda *_: "null"}


def _either(parts):
    parts = list(parts)
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def _literal(value, place):
    """A value as JSON writes it."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise ValueError(f"json_schema, {place}: {value} has a number that JSON does not; write another") from None
    if any("\ud800" <= char <= "\udfff" for char in text):
        text = json.dumps(value)
    return re.sub(r"[][\\.+*?(){}|^$#&~-]", r"\\\g<0>", text)


def _is_of(value, kind):
    numbers = {"integer": int, "number": (int, float)}
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, numbers.get(kind) or {"string": str, "array": list, "object": dict, "null": type(None),
                                                   "boolean": bool}[kind])


def _any_value():
    simple = _either([f'"{CHARACTER}*"', rf"-?{WHOLE}(?:\.[0-9]{{1,{DIGITS}}})?", "true", "false", "null"])
    return _either([simple, _repeated(r"\[", simple, 0, "", r"\]"),
                    _repeated(r"\{", f'"{CHARACTER}*" ?: ?{simple}', 0, "", r"\}")])


def _repeated(opening, item, least, most, closing):
    """`least` to `most` items ("": any number) between brackets."""
    if most == 0:
        return f"{opening} ?{closing}"
    items = f"{item}(?:{COMMA}{item}){{{max(0, least - 1)},{most and most - 1}}}"
    return f"{opening} ?{items if least else f'(?:{items})?'} ?{closing}"


def _members(members):
    """Of (what is written, whether it must be) each, in order, with commas between those that are there."""
    def behind(start):
        return "".join(f"{COMMA}{member}" if must else f"(?:{COMMA}{member})?" for member, must in members[start:])

    first = next((place for place, (_, must) in enumerate(members) if must), None)
    if first is None:
        return f"(?:{'|'.join(member + behind(place + 1) for place, (member, _) in enumerate(members))})?"
    return "".join(f"(?:{member}{COMMA})?" for member, _ in members[:first]) + members[first][0] + behind(first + 1)


def _between(low, high):
    """Regular expressions of the whole numbers from `low`, 0 or more, to `high`."""
    parts = []
    for digits in range(len(str(low)), len(str(high)) + 1):
        parts += _of_length(str(max(low, 10 ** (digits - 1) * (digits > 1))), str(min(high, 10 ** digits - 1)))
    return parts


def _of_length(low, high):
    """The same of numbers of as many digits, as text."""
    if not low:
        return [""]
    rest = len(low) - 1
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return [f"[{low[0]}-{high[0]}]" + f"[0-9]{{{rest}}}" * (rest > 0)]
    if low[0] == high[0]:
        return [low[0] + part for part in _of_length(low[1:], high[1:])]
    upper, lower = str(int(low[0]) + 1), str(int(high[0]) - 1)
    between = _of_length(upper + "0" * rest, lower + "9" * rest) if upper <= lower else []
    return [*_of_length(low, low[0] + "9" * rest), *between, *_of_length(high[0] + "0" * rest, high)]
