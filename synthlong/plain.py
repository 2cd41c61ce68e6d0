"""Plain JSON values: the one text of each, a short hash of that, and what differs between two, in words."""

from __future__ import annotations

import hashlib
import json
from typing import Any

__all__ = ["canonical_json", "differences", "plain_hash"]

_LONGEST = 24


def canonical_json(obj: object) -> str:
    """Return the one JSON text that stands for `obj`: sorted keys, no spaces, a newline at the end."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"


def plain_hash(plain: Any) -> str:
    """Return a short hash of plain JSON."""
    return hashlib.sha256(canonical_json(plain).encode()).hexdigest()[:16]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return `key: old -> new` of each value that differs, of nested ones `table.key`, in the order of the keys."""
    old, new = _flat(before), _flat(after)
    keys = sorted({*old, *new})
    return [f"{k}: {_shown(old.get(k))} -> {_shown(new.get(k))}" for k in keys if old.get(k) != new.get(k)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[:12]}..."
