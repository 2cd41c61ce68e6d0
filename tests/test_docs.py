"""The pages of `docs/artifacts`: their code runs, their links lead somewhere, their tables name every parameter."""

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from synthlong.augmentation import ARTIFACTS
from synthlong.options import Options
from synthlong.preparation.config import PreparationConfig
from synthlong.synthesis import SynthesisConfig
from synthlong.training.ohem import OhemConfig
from synthlong.training.stage_config import FinetuneConfig, PretrainConfig, SegmentConfig
from synthlong.training.training_config import TrainingConfig

CONFIGS = (
    SynthesisConfig,
    PreparationConfig,
    TrainingConfig,
    SegmentConfig,
    PretrainConfig,
    FinetuneConfig,
    OhemConfig,
)
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


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_is_listed_with_its_default(config):
    page = (DOCS.parent / "options.md").read_text()
    own = re.search(rf"^## [^\n]*`{config.__name__}`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)[1]
    listed = dict(re.findall(r"^\| `(\w+)` \| (?:`([^`]+)`)? \|", own, re.MULTILINE))
    if issubclass(config, TrainingConfig):
        shared = re.search(r"^## every `train`.*?(?=^## )", page, re.MULTILINE | re.DOTALL)[0]
        listed = dict(re.findall(r"^\| `(\w+)` \| (?:`([^`]+)`)? \|", shared, re.MULTILINE)) | listed
    defaults = {field.name: field.default for field in fields(config)}
    assert listed.keys() == defaults.keys()
    for name, default in defaults.items():
        wanted = "a table" if isinstance(default, Options) else "" if default is None else json.dumps(default)
        assert listed[name] == wanted, name
