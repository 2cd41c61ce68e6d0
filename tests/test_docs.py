"""The pages of `docs/artifacts`: their code runs, their links lead somewhere, their tables name every parameter."""

import inspect
import re
from pathlib import Path

import pytest

from synthlong.augmentation import ARTIFACTS

DOCS = Path(__file__).parents[1] / "docs" / "artifacts"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_code_runs(page):
    """Blocks of a page share their names, as a reader would type them one after the other."""
    if page == "use-elsewhere.md":
        pytest.importorskip("monai")
        pytest.importorskip("batchgeneratorsv2")
    names = {"__name__": page}
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_every_artifact_has_its_page(name):
    page = (DOCS / f"{name}.md").read_text()
    assert f"]({name}.png)" in page
    assert (DOCS / f"{name}.png").stat().st_size < 150_000
    assert blocks(f"{name}.md")
    for parameter in inspect.signature(ARTIFACTS[name]).parameters:
        assert parameter == "kwargs" or f"`{parameter}`" in page, parameter
    for named in (ARTIFACTS[name].__name__, ARTIFACTS[name].final.__name__, ARTIFACTS[name].final.kernel.__name__):
        assert f"`{named}`" in page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r'(?:\]\(|src=")([^)#"]+)', (DOCS / page).read_text()):
        assert link.startswith("https://") or (DOCS / link).exists(), link
