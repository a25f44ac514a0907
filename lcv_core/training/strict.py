"""Settings from YAML into frozen dataclasses: unknown keys and wrong values are refused with the known ones named."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lcv_core.errors import InputError

T = TypeVar("T")


def read_section(cls: type[T], data: Mapping[str, Any] | None, where: str) -> T:
    """`data` as an instance of the dataclass `cls`; fields are converted and checked by their annotations.

    where: what the keys are called in errors ("model", or "" at the top). InputError for an unknown key (naming the
    nearest known ones), a missing one, or a value of the wrong kind.
    """
    if data is not None and not isinstance(data, Mapping):
        raise InputError(f"{where or 'the recipe'} must be a mapping of names to values, got {data!r}")
    data = {} if data is None else data
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    check_keys(data, fields, where)
    missing = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{_path(where, missing[0])} is missing; the recipe has to say it")
    hints = get_type_hints(cls)
    return cls(**{name: convert(value, hints[name], _path(where, name)) for name, value in data.items()})


def check_keys(data: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    """InputError for the first key that is not known, with the nearest known ones."""
    known = list(known)
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3, cutoff=0.5) or sorted(known)
            raise InputError(f"unknown key {_path(where, str(key))}; did you mean {' or '.join(near)}?")


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value`, as YAML has it, as the annotated type; InputError naming `where` when it is none."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{where} must be {_either(map(repr, arguments))}, got {value!r}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if origin is tuple:
        return _convert_tuple(value, arguments, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} must be a mapping of names to values, got {value!r}")
        return {str(key): convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return read_section(hint, value, where)  # type: ignore[arg-type]
    return _convert_plain(value, hint, where)


def _convert_union(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    errors = []
    for choice in choices:
        if choice is not type(None):
            try:
                return convert(value, choice, where)
            except InputError as error:
                errors.append(error)
    raise errors[0]


def _convert_tuple(value: Any, arguments: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{where} must be a list, got {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise InputError(f"{where} must be a list of {len(arguments)}, got {list(value)}")
    return tuple(convert(item, hint, where) for item, hint in zip(value, arguments, strict=True))


def _convert_plain(value: Any, hint: Any, where: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint in (int, float) and not isinstance(value, bool):
        number = _number(value)
        if number is not None and (hint is float or number.is_integer()):
            return hint(value if isinstance(value, int) else number)
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value).expanduser()
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    raise InputError(f"{where} must be {kinds.get(hint, str(hint))}, got {value!r}")


def _number(value: Any) -> float | None:
    """YAML 1.1 reads 1e-4 as text, for want of a dot."""
    if not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def need(condition: bool, message: str) -> None:
    """InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _either(names: Iterable[str]) -> str:
    names = list(names)
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" or {names[-1]}"
