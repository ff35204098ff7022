"""Configuration is data: frozen, validated models read from TOML with `a.b=c` overrides.

An unknown key or a bad value is a one-line ValueError that names its source (a file or an override) and suggests the
nearest valid key. Values of overrides are TOML literals or plain strings; nothing is evaluated. Derived values are
functions elsewhere; this file does not define any setting of Omni's.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import reprlib
import tomllib
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from omni.errors import RetiredKeyWarning

Schema = TypeVar("Schema", bound=BaseModel)
_Keys = tuple[str | int, ...]  # the path of a value: keys, and indices of lists

MAX_DEPTH = 64  # of nested lists and tables
MAX_FILE_BYTES = 16 << 20  # of a configuration
MAX_OVERRIDE = 10_000  # characters
_KEY_PART = r"""(?:"[^"\n]*"|'[^'\n]*'|[\w-]+)"""
# A dotted key of more than MAX_DEPTH parts.
_LONG_KEY = re.compile(rf"(?:^|[{{,])[ \t]*\[*[ \t]*(?:{_KEY_PART}[ \t]*\.[ \t]*){{{MAX_DEPTH},}}", re.MULTILINE)


class Frozen(BaseModel):
    """Base of every configuration: immutable; unknown keys, infinities and NaN are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    def __init__(self, /, **data: Any) -> None:
        """One-line ValueError, as in `build`."""
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ValueError(explain(error, type(self), type(self).__name__)) from None

    __init__.__pydantic_base_init__ = True  # pyright: ignore  (validation of data does not call this)

    @classmethod
    def fields_by_key(cls) -> dict[str, FieldInfo]:
        """The fields by the keys that a table may give; omni.generation.grouped has more of these."""
        return cls.model_fields


def with_new_names(data: Mapping[str, Any], renamed: Mapping[str, str], source: str = "") -> dict[str, Any]:
    """`data` with each key of `renamed` under its new name, and a warning for it. ValueError where both are given; None
    is not given. `source` begins the line, such as "generation.json: "."""
    data = {name: value for name, value in data.items() if value is not None or name not in renamed}
    for old, new in renamed.items():
        if old in data and data.get(new) is not None:
            raise ValueError(f"{source}{old} and {new} are both given; {old} is the old name of {new}: leave it out")
        if old in data:
            warnings.warn(f"{source}{old} is called {new} now; rename it", RetiredKeyWarning, stacklevel=3)
            data.pop(new, None)
    return {renamed.get(name, name): value for name, value in data.items()}


# --------------------------------------------------------------------------------------------- reading


def load_toml(path: str | Path, overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """Read the TOML file at `path`, apply `overrides` (each "a.b=c", later ones win), validate as `schema`.

    The value of an override is a TOML literal (`3`, `true`, `[1, 2]`, `"x"`), else a plain string. A number in a key
    path indexes a list: `objectives.0.weight=2`. Raises a one-line ValueError for a missing or malformed file, an
    unknown key, a bad value or a malformed override.
    """
    return build(read_toml(path), schema, str(path), overrides)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The table of a TOML file; errors as in `load_toml`."""
    return _read(Path(path), parse_toml)


def load_json(path: str | Path, schema: type[Schema], overrides: Sequence[str] = ()) -> Schema:
    """The same for a JSON file, such as the config.json of a model directory."""
    path = Path(path)
    return build(_read(path, parse_json), schema, str(path), overrides)


def parse_json(data: str | bytes, source: str) -> Any:
    """The value of a JSON text (bytes: UTF-8). One-line ValueError naming `source` for invalid JSON, or for nesting
    deeper than MAX_DEPTH: later readers may recurse."""
    return _parsed(json.loads, "JSON", _decoded(data, "JSON", source), source)


def parse_toml(data: str | bytes, source: str) -> dict[str, Any]:
    """The table of a TOML text; errors as in `parse_json`."""
    text = _decoded(data, "TOML", source)
    if _LONG_KEY.search(text):  # the parser's time is quadratic in the parts of a key
        raise ValueError(f"{source}: a key of more than {MAX_DEPTH} parts; nest less deeply")
    return _parsed(tomllib.loads, "TOML", text, source)


def _parsed(parse: Callable[[str], Any], kind: str, text: str, source: str) -> Any:
    """The value that `parse` returns, with checked depth. One-line ValueError if it fails."""
    try:
        value = parse(text)
    except RecursionError:
        raise ValueError(_too_deep(source)) from None
    except ValueError as error:  # both parsers raise subclasses
        raise ValueError(f"{source!r} is not valid {kind}: {error}") from None
    check_depth(value, source)
    return value


def _decoded(data: str | bytes, kind: str, source: str) -> str:
    """The text of UTF-8 bytes; a str is returned as it is."""
    try:
        return data if isinstance(data, str) else data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source!r} is not valid {kind}: {error}") from None


def check_depth(value: Any, source: str) -> None:
    """ValueError naming `source` if mappings and sequences nest deeper than MAX_DEPTH."""
    level, depth = [value], 0
    while level := [node for node in level if isinstance(node, Mapping | list | tuple)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(_too_deep(source))
        level = [child for node in level for child in (node.values() if isinstance(node, Mapping) else node)]


def _too_deep(source: str) -> str:
    """The message for too deep nesting."""
    return f"{source!r} nests lists or tables more than {MAX_DEPTH} deep; use fewer levels"


def build(data: Mapping[str, Any], schema: type[Schema], source: str, overrides: Sequence[str] = ()) -> Schema:
    """Validate `data` (plain nested mappings; not modified) as `schema`; errors name `source` or the override."""
    check_depth(data, source)  # before it is copied
    tree = _copy(data)
    sources: dict[_Keys, tuple[str, str]] = {}
    for override in overrides:
        keys, raw = _parse_override(override)
        _assign(tree, keys, _literal(raw), override)
        sources[keys] = (f"override {override!r:.200}", raw)
        check_depth(tree, f"override {override:.80}...")
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        first_failure = error
    retry = _reread_as_text(tree, first_failure, sources)
    if retry:
        try:
            return schema.model_validate(tree)
        except ValidationError as error:
            first_failure = error
    names = {keys: name for keys, (name, _) in sources.items()}
    raise ValueError(explain(first_failure, schema, source, names)) from None


def _read(path: Path, parse: Callable[[bytes, str], Any]) -> dict[str, Any]:
    """The table of a file. One-line ValueError, with the nearest name if it is missing."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        siblings = [p.name for p in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) or "; give the path of an existing file"
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror or error}{hint}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{str(path)!r} has more than {MAX_FILE_BYTES:,} bytes; use a smaller configuration")
    return table_of(parse(data, str(path)), str(path))


def table_of(data: Any, source: str) -> dict[str, Any]:
    """`data` if it is a table of keys. Else ValueError naming `source`."""
    if not isinstance(data, dict):
        raise ValueError(f"{source!r} holds a {type(data).__name__}, not a table of keys")
    return data


def _copy(value: Any) -> Any:
    """A deep copy of mappings and lists; all other values are shared."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _parse_override(override: str) -> tuple[_Keys, str]:
    """(keys, raw value) of "a.b=c"."""
    name, separator, raw = override.partition("=")
    parts = [part.strip() for part in name.split(".")]
    if not separator or not all(parts):
        raise ValueError(f"override {override!r:.200} is not of the form key=value or table.key=value")
    if len(parts) > MAX_DEPTH or len(override) > MAX_OVERRIDE:
        raise ValueError(
            f"override {override[:80]!r}... has more than {MAX_DEPTH} parts or {MAX_OVERRIDE:,} characters"
        )
    return tuple(int(part) if part.isdecimal() and len(part) < 10 else part for part in parts), raw.strip()


def _literal(raw: str) -> Any:
    """A TOML value, or the string itself when it is not one."""
    text = f"value = {raw}"
    try:
        parsed = tomllib.loads(text)
    except RecursionError:
        raise ValueError(_too_deep(f"override {raw[:80]}...")) from None
    except ValueError:
        return raw
    return parsed["value"] if parsed.keys() == {"value"} else raw


def _assign(tree: dict[str, Any], keys: _Keys, value: Any, override: str) -> None:
    """Set the value at `keys` in the tree, in place; missing tables are made."""
    node: Any = tree
    for depth, key in enumerate(keys):
        index: Any = str(key) if isinstance(node, dict) else key
        if isinstance(node, list) and (not isinstance(key, int) or key >= len(node)):
            raise ValueError(f"override {override!r}: {key!r} is not an index of a list of {len(node)}")
        if not isinstance(node, list | dict):
            parent = ".".join(map(str, keys[:depth]))
            raise ValueError(f"override {override!r}: {parent!r} is the value {node!r}, not a table")
        if depth == len(keys) - 1:
            node[index] = value
        elif isinstance(node, dict):
            node = node.setdefault(index, {})
        else:
            node = node[index]


def _reread_as_text(tree: Any, error: ValidationError, sources: Mapping[_Keys, tuple[str, str]]) -> bool:
    """Restore the raw text of overrides whose field is text: `name=8` is then "8". Returns whether any changed."""
    changed = False
    for item in error.errors(include_url=False):
        keys = tuple(item["loc"])
        if item["type"] in ("string_type", "path_type") and keys in sources:
            node = tree
            for key in keys[:-1]:
                node = node[key]
            node[keys[-1]] = sources[keys][1]
            changed = True
    return changed


# --------------------------------------------------------------------------------------------- errors


def explain(
    error: ValidationError, schema: type[BaseModel], source: str, overrides: Mapping[_Keys, str] | None = None
) -> str:
    """One line for a ValidationError: source, key, value, and for an unknown key the nearest valid one."""
    items = error.errors(include_url=False)
    lines = [_explain_item(item, schema, source, overrides or {}) for item in items[:3]]
    more = f" (and {len(items) - 3} more)" if len(items) > 3 else ""
    return "; ".join(lines) + more


def _explain_item(item: ErrorDetails, schema: type[BaseModel], source: str, overrides: Mapping[_Keys, str]) -> str:
    """One line for one error of pydantic."""
    keys: _Keys = tuple(item["loc"])
    for start, name in overrides.items():
        if keys[: len(start)] == start:
            source = name
    dotted = f"{'.'.join(map(str, keys)):.200}"
    if item["type"] == "extra_forbidden":
        siblings = _fields_at(schema, keys[:-1])
        hint = nearest(str(keys[-1]), siblings) or _hint_of_deeper_key(str(keys[-1]), schema)
        return f"{source}: unknown key {dotted!r}{hint or _hint_of_known_keys(siblings)}"
    if item["type"] == "missing":
        return f"{source}: key {dotted!r} is missing; set it"
    field = _field_at(schema, keys)
    message = (field and _range_message(item, field)) or item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" and isinstance(item["input"], Mapping | BaseModel):
        return f"{source}: {dotted}: {message}" if keys else f"{source}: {message}"  # the message names the key in it
    return f"{source}: {dotted} = {_short(item['input'])}: {message}" if keys else f"{source}: {message}"


class _Short(reprlib.Repr):
    """A repr of bounded length, in bounded time, for a value of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 200
        self.maxtuple = self.maxlist = self.maxdict = 10

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 600 else f"a number of {x.bit_length()} bits"


def _short(value: Any) -> str:
    """A repr of at most 203 characters."""
    text = _Short().repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


_BOUNDS = {"ge": "at least {}", "gt": "greater than {}", "le": "at most {}", "lt": "less than {}"}
_OF_NUMBERS = ("greater_than", "less_than", "int_", "float_", "finite_number")


def _range_message(item: ErrorDetails, field: FieldInfo) -> str | None:
    """The valid range of a field, and a way out; None to use pydantic's message."""
    types_of = set(typing.get_args(field.annotation)) | {field.annotation}
    if item["type"].startswith("bool_"):
        return "must be true or false"
    if not item["type"].startswith(_OF_NUMBERS) or not types_of & {int, float}:
        return None
    finite = "a finite number" if item["type"] == "finite_number" else "a number"
    what = finite if float in types_of else "a whole number"
    bounds = bounds_of(field)
    if field.is_required():
        return f"must be {what} {bounds}".rstrip()
    default = field.get_default(call_default_factory=True)
    return f"must be {what} {bounds}".rstrip() + ("; or leave it out" if default is None else f"; {default} is usual")


def bounds_of(field: FieldInfo) -> str:
    """The bounds of a number, "from 1 to 1000" or "at least 1"; empty without bounds."""
    pairs = ((name, getattr(one, name, None)) for one in field.metadata for name in _BOUNDS)
    found = {name: bound for name, bound in pairs if bound is not None}
    if found.keys() == {"ge", "le"}:
        return f"from {_plain(found['ge'])} to {_plain(found['le'])}"
    return " and ".join(text.format(_plain(found[name])) for name, text in _BOUNDS.items() if name in found)


def _plain(bound: float) -> str:
    """A bound in short form: 1000, 0.001, 1e-06."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The text `; did you mean 'x'?` for the nearest of `known`; empty if none is near."""
    pool = sorted(set(known))
    lowered = {candidate.lower(): candidate for candidate in pool}
    matches = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return f"; did you mean {lowered[matches[0]]!r}?" if matches else ""


def _hint_of_known_keys(names: Iterable[str]) -> str:
    """The text `; known keys: ...` for an unknown key."""
    listed = ", ".join(sorted(names))
    return f"; known keys: {listed}" if listed else "; this table takes no keys"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every model class in an annotation: unions, lists, dicts, Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


def _fields_at(schema: type[BaseModel], keys: _Keys) -> list[str]:
    """Field names allowed in the table at `keys`; list indices and union tags in `keys` are stepped over."""
    return [name for model in _models_at(schema, keys) for name in _fields_of(model)]


def _field_at(schema: type[BaseModel], keys: _Keys) -> FieldInfo | None:
    """The field at `keys`; None for an item of a list."""
    models = _models_at(schema, keys[:-1])
    tables = [_fields_of(model) for model in models]
    return next((fields[str(keys[-1])] for fields in tables if keys and keys[-1] in fields), None)


def _fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model by name, and by the keys of its groups."""
    return model.model_fields | (model.fields_by_key() if issubclass(model, Frozen) else {})


def _models_at(schema: type[BaseModel], keys: _Keys) -> list[type[BaseModel]]:
    """The models that the table at `keys` may have."""
    models: list[type[BaseModel]] = [schema]
    for key in keys:
        below = [m.model_fields[key].annotation for m in models if isinstance(key, str) and key in m.model_fields]
        if below:
            models = [model for annotation in below for model in _models_in(annotation)]
        else:
            tagged = [m for m in models if isinstance(key, str) and _is_tag(m, key)]
            models = tagged or models
    return models


def _is_tag(model: type[BaseModel], tag: str) -> bool:
    """Whether `tag` is the name of a model or one of its literal values: the tag of a union in an error."""
    literals = (typing.get_args(f.annotation) for f in model.model_fields.values())
    return model.__name__ == tag or any(tag in args for args in literals)


def _hint_of_deeper_key(name: str, schema: type[BaseModel]) -> str:
    """A valid key one or more tables below: `lr` -> did you mean 'optimiser.lr'?"""
    dotted = _dotted_fields(schema, "", 0)
    found = [key for key in dotted if key.rpartition(".")[2] == name]
    return f"; did you mean {found[0]!r}?" if found else ""


def _dotted_fields(schema: type[BaseModel], prefix: str, depth: int) -> list[str]:
    """The dotted names of all fields, at most 5 tables deep."""
    if depth > 4:
        return []
    names: list[str] = []
    for name, info in schema.model_fields.items():
        names.append(prefix + name)
        for model in _models_in(info.annotation):
            names += _dotted_fields(model, f"{prefix}{name}.", depth + 1)
    return names


# --------------------------------------------------------------------------------------------- identity


def canonical_json(config: BaseModel | Mapping[str, Any]) -> str:
    """JSON with sorted keys and no spaces: equal configurations give equal text. ValueError for NaN or infinity.
    Digests of stored runs are made of it: never change it."""
    data = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(config: BaseModel | Mapping[str, Any]) -> str:
    """128-bit blake2b of the canonical JSON, as 32 hex digits. Stored in checkpoints: never change it."""
    return hashlib.blake2b(canonical_json(config).encode("utf-8"), digest_size=16).hexdigest()
