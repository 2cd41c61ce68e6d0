"""Names of a package that resolve on first use (PEP 562), listed once: in the stub that editors and mypy read."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["names_of"]


def names_of(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return a package's `__getattr__`, `__dir__` and `__all__`.

    Args:
        package: Its `__name__`.
        file: Its `__file__`; beside it lies the stub, `__init__.pyi`, whose imports say where the names are.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [statement for statement in stub.body if isinstance(statement, ast.ImportFrom)]
    eager = [ast.unparse(statement.target) for statement in stub.body if isinstance(statement, ast.AnnAssign)]
    home = {alias.name: f"{package}.{statement.module}" for statement in imports for alias in statement.names}

    def resolve(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home[name]), name)

    names = sorted([*eager, *home])
    return resolve, lambda: names, names
