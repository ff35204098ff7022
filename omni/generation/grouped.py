"""A configuration in groups: some of its fields are models of their own, and their keys may also be given flat.

    Options(steps=4)    is    Options(picture={"steps": 4})    is    Options(picture=PictureOptions(steps=4))

Names are unique over the groups. `flatten` finds the group of a name, the name of a group's value, and the new name of
an old key; nothing else does. Errors name a key by its flat name, however it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails

from omni.config import Frozen, build, with_new_names


class Grouped(Frozen):
    """Base of such a configuration. Raises ValueError where one key is given flat and in its group.

    A subclass may list keys of earlier versions in `renamed`: old name -> new name.
    """

    renamed: ClassVar[Mapping[str, str]] = {}

    @classmethod
    @cache
    def groups(cls) -> dict[str, type[BaseModel]]:
        """The fields that are models, by name."""
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        return {n: kind for n, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}

    @classmethod
    def fields_by_key(cls) -> dict[str, FieldInfo]:
        """Every field by its flat name: those of no group first. Groups themselves are left out."""
        groups = cls.groups()
        own = {name: field for name, field in cls.model_fields.items() if name not in groups}
        return own | {name: field for group in groups.values() for name, field in group.model_fields.items()}

    @classmethod
    def flatten(cls, data: Mapping[str, Any], source: str = "") -> dict[str, Any]:
        """`data`, flat, nested or both, as one flat table under today's names; a key that is None is not given. Of a
        group only keys that it does not have stay nested. ValueError, after `source`, where a key is given twice, and
        where a group is None or a model of another kind."""
        groups = cls.groups()
        data = with_new_names(data, cls.renamed, source)
        flat = {name: value for name, value in data.items() if name not in groups}
        for group, kind in groups.items():
            part = data.get(group, {})
            if part is None or (isinstance(part, BaseModel) and not isinstance(part, kind)):
                raise ValueError(f"{source}{group} = {part!r:.80} must be {kind.__name__} or a table; or leave it out")
            if isinstance(part, BaseModel):
                part = {name: getattr(part, name) for name in part.model_fields_set}
            if not isinstance(part, Mapping):
                flat[group] = part
                continue
            part = with_new_names(part, cls.renamed, source)
            for name in [name for name in kind.model_fields if name in part]:
                if flat.get(name) is None:
                    flat[name] = part[name]
                elif part[name] is not None:
                    raise ValueError(f"{source}{name} is given twice, as {name} and as {group}.{name}; leave one out")
            if unknown := {name: value for name, value in part.items() if name not in kind.model_fields}:
                flat[group] = unknown
        return flat

    @model_validator(mode="wrap")
    @classmethod
    def _by_group(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, Mapping):
            return handler(data)
        flat = cls.flatten(data)
        for group, kind in cls.groups().items():
            part = {name: flat.pop(name) for name in kind.model_fields if name in flat}
            if isinstance(flat.get(group, {}), Mapping):
                flat[group] = {**part, **flat.get(group, {})}
        try:
            return handler(flat)
        except ValidationError as error:
            found = [cls._flat_error(item) for item in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(cls.__name__, found) from None

    @classmethod
    def _flat_error(cls, item: Any) -> InitErrorDetails:
        """The error at the flat name of its key; that of a rule between keys of a group, at no key."""
        group, *rest = item["loc"] or ("",)
        known = cls.groups().get(group)
        is_flat = known is not None and (rest[0] in known.model_fields if rest else item["type"] == "value_error")
        loc = tuple(rest) if is_flat else item["loc"]
        return InitErrorDetails(type=item["type"], loc=loc, input=item["input"], ctx=item.get("ctx", {}))

    def flat(self, mode: str = "python") -> dict[str, Any]:
        """Every value by its flat name, as a dict that the class takes. mode: of pydantic's `model_dump`."""
        dumped, groups = self.model_dump(mode=mode), self.groups()
        own = {name: value for name, value in dumped.items() if name not in groups}
        return own | {name: value for group in groups for name, value in dumped[group].items()}

    def changed(self, changes: Mapping[str, Any], source: str = "options") -> Self:
        """A copy with some values changed, flat or nested, all of it checked. A ValueError begins with `source`."""
        return build({**self.flat(), **self.flatten(changes, f"{source}: ")}, type(self), source)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As `changed`: pydantic's own copy would take a flat name unchecked, and lose it."""
        return self.changed(update or {})
