"""Options that several verbs share."""

from __future__ import annotations

from enum import StrEnum

import typer

from synthlong.errors import ConfigError

__all__ = ["PREFER", "Prefer", "each_with", "ranges_of"]


class Prefer(StrEnum):
    """The two orientations of a NIfTI header."""

    sform = "sform"
    qform = "qform"


PREFER = typer.Option(None, help="Which of two disagreeing orientations to use.")
"""`--prefer`, for each verb that reads scans."""


def each_with(arguments: list[str], option: str, ending: str) -> list[str]:
    """Return a command line in which an option stands before each of the files that follow it: `-w a b`, `-w *.x`."""
    each: list[str] = []
    following = False
    for word in arguments:
        if following and each[-1] != option and word.endswith(ending):
            each.append(option)
        following = word == option or (following and word.endswith(ending))
        each.append(word)
    return each


def ranges_of(text: str, option: str) -> list[range]:
    """Return the numbers of a list such as `0,5,10-12`.

    Raises:
        ConfigError: Something else.
    """
    ranges: list[range] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ConfigError(f"{option} {text}: give numbers such as 0,5 or 0-9")
        ranges.append(range(int(first), int(last) + 1))
    return ranges
