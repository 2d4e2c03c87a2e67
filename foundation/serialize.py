"""Config dataclasses to JSON and back, strictly.

Every config of this project is a frozen dataclass. A run stores it resolved as JSON; reading it back refuses what the
dataclass does not know, because a misspelt key that is silently dropped is an experiment that silently did something
else.
"""

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from foundation.files import read_json, write_json

Config = TypeVar("Config")


class Family:
    """A config that comes in kinds (a routing policy, say): `class PolicyConfig(Family)` is a family, and every
    dataclass derived from it, wherever it is defined, is one of its kinds.

    A field declared as a family, or as a union of its kinds, may hold any kind.
    """


def kinds(family: type) -> dict[str, type]:
    """The kinds of a family by class name.

    Raises:
        ValueError: where kinds of two places share a name, which is all that a stored config keeps of its class.
    """
    found: dict[str, type] = {}
    waiting = family.__subclasses__()
    while waiting:
        kind = waiting.pop(0)
        # A kind may be what further kinds are derived from.
        waiting += kind.__subclasses__()
        # Not `is_dataclass`: a class that only inherits from a dataclass is none of its own.
        if "__dataclass_params__" not in vars(kind):
            continue
        other = found.setdefault(kind.__name__, kind)
        if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(f"{family.__name__}: {other.__module__} and {kind.__module__} both define {kind.__name__}")
        # A module that was loaded again defined its classes again: the last ones are those in use.
        found[kind.__name__] = kind
    return found


def to_dict(config: Any) -> Any:
    """The JSON-ready form of a config dataclass: nested dicts, lists, numbers, strings.

    A field declared as a `Family`, or as a union of dataclasses, is stored with its class name under "type".
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        hints = typing.get_type_hints(type(config))
        stored = {}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            tag = (
                {"type": type(value).__name__}
                if _alternatives(hints[field.name]) and dataclasses.is_dataclass(value)
                else {}
            )
            stored[field.name] = {**tag, **to_dict(value)} if tag else to_dict(value)
        return stored
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def from_dict(cls: type[Config], stored: Mapping[str, Any], place: str = "") -> Config:
    """Inverse of `to_dict`. `place` names where the mapping came from in error messages.

    Raises:
        ValueError: for an unknown key (with the nearest legal one), an unknown "type", a missing key or a value of
            another type than the field's, naming the place.
    """
    place = place or cls.__name__
    if not isinstance(stored, Mapping):
        raise ValueError(f"{place}: {_shown(stored)}, must be an object with the fields of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # pyright: ignore[reportArgumentType]
    for key in stored:
        if key not in fields:
            raise ValueError(f"{place}: unknown key {key!r}; {nearest(key, fields)}")
    missing = [name for name, field in fields.items() if name not in stored and _has_no_default(field)]
    if missing:
        raise ValueError(f"{place}: missing {', '.join(missing)}")
    return cls(**{key: _restore(hints[key], value, f"{place}.{key}") for key, value in stored.items()})


def nearest(name: str, legal: typing.Iterable[str]) -> str:
    """A phrase that helps someone who misspelt `name`: the nearest legal name, and all of them."""
    legal = sorted(legal)
    close = difflib.get_close_matches(name, legal, n=1, cutoff=0.4)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}Legal: {', '.join(legal)}"


def save_json(path: Path, config: Any) -> None:
    """Replaces `path` atomically by a config's JSON form."""
    write_json(path, to_dict(config))


def load_json(cls: type[Config], path: Path) -> Config:
    """Inverse of `save_json`.

    Raises:
        ValueError: for a file that holds no such config, naming the file.
        CorruptFileError: naming the file, where it is cut or no JSON.
    """
    stored = read_json(path)
    try:
        return from_dict(cls, stored, place=str(path))
    except ValueError as error:
        # A config that refuses its own values does not know where they came from.
        raise error if str(error).startswith(str(path)) else ValueError(f"{path}: {error}") from error


def _restore(hint: Any, value: Any, place: str) -> Any:
    """The value of a field from its JSON form, strictly of the type that the field declares."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if value is None and (hint is types.NoneType or types.NoneType in arguments):
        return None
    if alternatives := _alternatives(hint):
        if isinstance(value, Mapping):
            tag = value.get("type")
            if tag not in alternatives:
                raise ValueError(f"{place}: unknown type {tag!r}; {nearest(str(tag), alternatives)}")
            return from_dict(alternatives[tag], {key: item for key, item in value.items() if key != "type"}, place)
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, typing.cast(Mapping[str, Any], value), place)
    elif origin in (types.UnionType, typing.Union):
        members = [member for member in arguments if member is not types.NoneType]
        # A single member says what is wrong inside of it; of several one has to fit.
        if len(members) == 1:
            return _restore(members[0], value, place)
        for member in members:
            with contextlib.suppress(ValueError):
                return _restore(member, value, place)
    elif origin is typing.Literal:
        if any(value == legal and type(value) is type(legal) for legal in arguments):
            return value
        raise ValueError(f"{place}: {_shown(value)} is none of {', '.join(map(repr, arguments))}")
    elif tuple in (origin, hint):
        if isinstance(value, list | tuple):
            repeated = not arguments or arguments[-1] is Ellipsis
            hints = [arguments[0] if arguments else Any] * len(value) if repeated else arguments
            if len(hints) != len(value):
                raise ValueError(f"{place}: {_shown(value)}, must be {len(hints)} values")
            return tuple(
                _restore(item_hint, item, f"{place}[{index}]")
                for index, (item_hint, item) in enumerate(zip(hints, value))
            )
    elif dict in (origin, hint):
        if isinstance(value, Mapping):
            item_hint = arguments[1] if arguments else Any
            return {key: _restore(item_hint, item, f"{place}.{key}") for key, item in value.items()}
    elif hint is Path:
        if isinstance(value, str):
            return Path(value)
    elif hint is float:
        # JSON has one kind of number; a float that was written as an integer stays one, and so its hash.
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    elif hint in (bool, int, str):
        if type(value) is hint:
            return value
    else:
        raise TypeError(f"{place}: fields of type {hint} cannot be stored")
    raise ValueError(f"{place}: {_shown(value)}, must be {_type_name(hint)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _alternatives(hint: Any) -> dict[str, type]:
    """What a value of this hint may be, by class name: the kinds of a family, the dataclasses of a union such as
    `Fixed | Threshold`; empty for a single dataclass or `Config | None`."""
    members = [hint] if isinstance(hint, type) else typing.get_args(hint)
    members = [member for member in members if isinstance(member, type) and dataclasses.is_dataclass(member)]
    families = {base for member in members for base in member.__mro__ if Family in base.__bases__}
    # A union of kinds stands for their family: it was made before kinds that somebody else has added.
    if len(families) == 1 and (len(members) > 1 or families == set(members)):
        return kinds(families.pop())
    return {member.__name__: member for member in members} if len(members) > 1 else {}


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
