"""Config dataclasses to JSON and back, strictly.

Every config of this project is a frozen dataclass. A run stores it resolved as JSON; reading it back refuses what the
dataclass does not know, because a misspelt key that is silently dropped is an experiment that silently did something
else.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")


def to_dict(config: Any) -> Any:
    """The JSON-ready form of a config dataclass: nested dicts, lists, numbers, strings.

    A field declared as a union of dataclasses (a routing policy, say) is stored with its class name under "type".
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
        ValueError: for an unknown key (with the nearest legal one), an unknown "type" or a missing key, naming the
            place.
    """
    place = place or cls.__name__
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
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load_json(cls: type[Config], path: Path) -> Config:
    return from_dict(cls, json.loads(path.read_text()), place=str(path))


def _restore(hint: Any, value: Any, place: str) -> Any:
    if alternatives := _alternatives(hint):
        if isinstance(value, Mapping):
            named = {alternative.__name__: alternative for alternative in alternatives}
            tag = value.get("type")
            if tag not in named:
                raise ValueError(f"{place}: unknown type {tag!r}; {nearest(str(tag), named)}")
            return from_dict(named[tag], {key: item for key, item in value.items() if key != "type"}, place)
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, place)
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [alternative for alternative in typing.get_args(hint) if alternative is not type(None)]
        return None if value is None else _restore(inner[0], value, place)
    if origin is tuple:
        item_hint = typing.get_args(hint)[0] if typing.get_args(hint) else Any
        return tuple(_restore(item_hint, item, f"{place}[{index}]") for index, item in enumerate(value))
    return Path(value) if hint is Path else value


def _alternatives(hint: Any) -> list[type]:
    """The dataclasses of a union type such as `TopK | TopP`; empty for a single dataclass or `Config | None`."""
    found = [alternative for alternative in typing.get_args(hint) if dataclasses.is_dataclass(alternative)]
    return typing.cast(list[type], found) if len(found) > 1 else []


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
