"""What all configs share: frozen, typed by their defaults, from TOML or code, plain JSON."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from synthlong.errors import ConfigError, short

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """Base of the configs; a subclass calls `super().__post_init__()`, then `check` for each range.

    The values of an option whose type is a `Literal` are checked here.

    An option may be a config itself: a table in a file, whose options overrule those of its default.

    Attributes:
        PATHS: Names of the options that are paths; in a file they are relative to it.
    """

    PATHS: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for option in fields(self):
            value = _plain(option.name, getattr(self, option.name), option.default)
            object.__setattr__(self, option.name, value)
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                *most, last = choices = get_args(kind)
                self.check((name,), choices.__contains__, f"{', '.join(most)} or {last}")

    @classmethod
    def from_toml(cls, path: str | Path, **overruling: Any) -> Self:
        """Read a config; keys are the arguments of this class, paths are relative to the file.

        Args:
            path: The file.
            overruling: Options that count instead of the file's.

        Raises:
            ConfigError: Not TOML, an unknown key, a value of the wrong type or outside its range.
        """
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{short(path)}: not a readable TOML file ({error})") from error
        cls._resolve_paths(values, path.parent)
        try:
            return cls.from_dict(values | overruling)
        except ConfigError as error:
            if any(str(error).startswith(f"{name} = ") for name in overruling):
                raise
            raise ConfigError(f"{short(path)}: {error}") from error

    @classmethod
    def _resolve_paths(cls, values: dict[str, Any], folder: Path) -> None:
        """Make the paths of a file absolute, those of its tables too."""
        for key in cls.PATHS:
            if isinstance(values.get(key), str):
                values[key] = str((folder / values[key]).resolve())
        for option in fields(cls):
            if isinstance(option.default, Options) and isinstance(values.get(option.name), dict):
                option.default._resolve_paths(values[option.name], folder)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a config from plain values, refusing unknown keys and wrong types."""
        known = {f.name: f for f in fields(cls)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise ConfigError(f"unknown option {key!a}; {hint}")
        return cls(**values)

    def absolute(self) -> Self:
        """Return the config with absolute paths, which are the same from any working directory."""
        named = {name: getattr(self, name) for name in self.PATHS}
        return replace(self, **{name: str(Path(path).absolute()) for name, path in named.items() if path})

    def as_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        return {name: v.as_dict() if isinstance(v, Options) else v for name, v in plain.items()}

    def check(self, names: tuple[str, ...], good: Callable[[Any], bool], range_: str) -> None:
        """Raise a ConfigError that names the option, its value and its range."""
        for name in names:
            value = getattr(self, name)
            if not good(value):
                raise ConfigError(f"{name} = {value!a}: must be {range_}")


def _plain(name: str, value: Any, default: Any) -> Any:
    """Return a value in the type of its option's default, so that equal configs have equal JSON."""

    def number(v: Any) -> float:
        if isinstance(v, bool) or not isinstance(v, (int, float)):
            raise TypeError
        return float(v)

    if isinstance(default, Options) and isinstance(value, dict):
        try:
            return default.from_dict(default.as_dict() | value)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    kinds = {float: "a number", int: "a whole number", bool: "true or false", tuple: "a list of numbers"}
    try:
        if isinstance(default, float):
            return number(value)
        if isinstance(default, tuple) and isinstance(value, (list, tuple)):
            return tuple(number(v) for v in value)
        wanted = (str, type(None)) if default is None else type(default)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
            raise TypeError
    except (TypeError, OverflowError):
        raise ConfigError(f"{name} = {value!a}: must be {kinds.get(type(default), 'text')}") from None
    return value
