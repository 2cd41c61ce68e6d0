import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import synthlong
import synthlong.detection
import synthlong.preparation

ROOT = Path(synthlong.__file__).parent
MODULES = sorted(
    ".".join(("synthlong", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if path.name != "__init__.py" and "assets" not in path.parts
)


def group(name):
    """Constants first, then classes, then functions, as ruff sorts them."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


@pytest.mark.parametrize("name", MODULES)
def test_each_module_says_what_it_exports(name):
    module = import_module(name)
    assert all(hasattr(module, n) for n in module.__all__)
    assert list(module.__all__) == sorted(set(module.__all__), key=group)


def test_what_other_modules_import_is_exported():
    for path in ROOT.rglob("*.py"):
        imports = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom))
        for node in imports:
            if node.module in MODULES:
                assert {n.name for n in node.names} <= set(import_module(node.module).__all__), (path, node.module)


@pytest.mark.parametrize("package", [synthlong, synthlong.detection, synthlong.preparation])
def test_lazy_names_resolve(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(dir(package)) >= set(package.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


@pytest.mark.parametrize("heavy", ["torch", "numba", "scipy", "nibabel"])
def test_importing_the_package_is_light(heavy):
    code = f"import sys, synthlong; raise SystemExit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
