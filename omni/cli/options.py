"""Flags of the command line, made from the fields of `GenerationOptions`: one flag per field, in the fields' groups.

A flag's text becomes a value here; whether the value is allowed is decided by the field alone. The commands of
`omni chat` set the same options in the same way. This file loads no torch: `--help` and a bad value answer at once.
"""

from __future__ import annotations

import argparse
import typing
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from omni.config import bounds_of, explain
from omni.generation.options import RENAMED, WHOLE_REQUEST, GenerationOptions
from omni.registry import names_in_source

RANDOM = "random"  # of --seed: a fresh one
DEFAULT = "default"  # in a chat: the field's own default again
SWITCH = {"on": True, "off": False}  # in a chat; on the command line a flag is on
FIELDS = GenerationOptions.fields_by_key()


def flag_of(name: str) -> str:
    """The flag of a field: "max_tokens" -> "--max-tokens"."""
    return _flag(_flag_settings(FIELDS[name])["flag"] or name)


def chat_options() -> list[str]:
    """The fields that have a command in `omni chat`."""
    return [name for name, field in FIELDS.items() if _flag_settings(field)["in_chat"]]


def add_options(parser: argparse.ArgumentParser) -> Any:
    """A group of flags for each group of options. Returns the one of the whole request."""
    groups = GenerationOptions.groups()
    whole = parser.add_argument_group(WHOLE_REQUEST)
    for name, field in GenerationOptions.model_fields.items():
        if name in groups:
            place = parser.add_argument_group(field.description)
            for key, option in groups[name].model_fields.items():
                _add_flag(place, key, option)
        else:
            _add_flag(whole, name, field)
    for old in RENAMED:
        whole.add_argument(_flag(old), dest=old, help=argparse.SUPPRESS)
    return whole


def options_of(arguments: argparse.Namespace) -> GenerationOptions:
    """The options that were given; the rest keep their defaults. ValueError that names the flag."""
    given = {name: value for name in (*FIELDS, *RENAMED) if (value := getattr(arguments, name, None)) is not None}
    return build_options({name: parse_value(name, value) for name, value in given.items()}, "command line")


def changed_by(options: GenerationOptions, name: str, texts: list[str], line: str) -> GenerationOptions:
    """`options` with one field set from text, as a line of a chat does. ValueError that names the line `line`."""
    if texts == [DEFAULT]:
        value = FIELDS[name].default
    else:
        value = parse_value(name, texts if FIELDS[name].annotation == tuple[str, ...] else texts[0])
    return build_options({**options.flat(), name: value}, line, {name: line})


def build_options(values: dict[str, Any], source: str, names: dict[str, str] | None = None) -> GenerationOptions:
    """GenerationOptions of `values`. A ValueError names the flag of the field, or what `names` has for it."""
    try:
        return GenerationOptions.model_validate(values)
    except ValidationError as error:
        flags: dict[tuple[str | int, ...], str] = {(n,): (names or {}).get(n, flag_of(n)) for n in FIELDS}
        raise ValueError(explain(error, GenerationOptions, source, flags)) from None


def parse_value(name: str, text: Any) -> Any:
    """A field's value as text gives it. Text that is no number stays text, which the field then refuses by name."""
    field = FIELDS[RENAMED.get(name, name)]
    kinds = {field.annotation, *typing.get_args(field.annotation)}
    if not isinstance(text, str):
        return text  # a switch, or the list of a flag that may be repeated
    if name == "seed" and text == RANDOM:
        return None
    if bool in kinds:
        return SWITCH.get(text, text)
    if name == "image_size":
        sides = _to_numbers(text.lower().split("x"), int)
        return tuple(sides) if sides else text
    if name == "grid":
        parts = text.split(",")
        return (_to_numbers(parts) or parts) if len(parts) > 1 else text
    for kind in (int, float):
        if kind in kinds:
            return (_to_numbers([text], kind) or [text])[0]
    return text


def _to_numbers(texts: list[str], kind: type = float) -> list[Any] | None:
    """The numbers of the texts; None if one of them is none."""
    try:
        return [kind(text) for text in texts]
    except ValueError:
        return None


def _flag_settings(field: FieldInfo) -> dict[str, Any]:
    """A field's extras: flag, metavar, in_chat, names (see generation.options)."""
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra


def _flag(name: str) -> str:
    """ "max_tokens" -> "--max-tokens"."""
    return "--" + name.replace("_", "-")


def _add_flag(place: Any, name: str, field: FieldInfo) -> None:
    """Add the flag of one field; its help names bounds, known names and default."""
    about = (field.description or "").replace("%", "%%")
    if field.annotation is bool:
        place.add_argument(flag_of(name), dest=name, action="store_true", default=None, help=about)
        return
    metavar = _flag_settings(field)["metavar"]
    if field.annotation == tuple[str, ...]:
        place.add_argument(flag_of(name), dest=name, action="append", metavar=metavar, help=f"{about} (repeatable)")
        return
    notes = [bounds_of(field) if name != "seed" else f"a number, or {RANDOM}"]
    notes += [", ".join(names_in_source(*names))] if (names := _flag_settings(field)["names"]) else []
    notes += [f"default {_default_text(field.default)}"] if field.default is not None else []
    note = "; ".join(note for note in notes if note)
    place.add_argument(flag_of(name), dest=name, metavar=metavar, help=about + (f" ({note})" if note else ""))


def _default_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
