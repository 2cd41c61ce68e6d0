"""README and `docs/`: their code runs, their links lead somewhere, their tables name every parameter and option."""

import inspect
import json
import re
import shutil
import warnings
from dataclasses import fields
from pathlib import Path

import nibabel as nib
import pytest
import torch

from synthlong.augmentation import ARTIFACTS
from synthlong.dataset.run import generate
from synthlong.errors import InputWarning
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
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "artifacts"
PAGES = sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
OF_A_RUN = ("README.md", "docs/detection.md", "docs/evaluation.md", "docs/shards.md")
"""Their code reads scans, masks and a run under the names of `files`."""


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def run_blocks(page, **names):
    """Blocks of a page share their names, as a reader would type them one after the other."""
    names["__name__"] = page
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/artifacts/") and blocks(page)])
def test_code_runs(page):
    if page == "docs/artifacts/use-elsewhere.md":
        pytest.importorskip("monai")
        pytest.importorskip("batchgeneratorsv2")
    run_blocks(page)


@pytest.fixture(scope="module")
def files(manifest, tmp_path_factory):
    """A folder with what the pages read: scans, masks, and a run of four pairs."""
    folder = tmp_path_factory.mktemp("docs")
    for path in (manifest, *manifest.parent.glob("cs*.nii.gz")):
        shutil.copy(path, folder)
    for kind, names in (("FLAIR", ("flair", "baseline_flair")), ("mask", ("lesions", "truth", "new"))):
        for name in names:
            shutil.copy(folder / f"cs07_{kind}.nii.gz", folder / f"{name}.nii.gz")
    scan = nib.load(folder / "flair.nii.gz")
    nib.save(nib.Nifti1Image(1.1 * scan.get_fdata(), scan.affine), folder / "followup_flair.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        generate(folder / "cases.csv", folder / "pairs", workers=1, pairs=4, seed=3)
    return folder


@pytest.mark.parametrize("page", OF_A_RUN)
@pytest.mark.filterwarnings("ignore::synthlong.errors.InputWarning")
def test_code_runs_on_files(page, files, monkeypatch):
    monkeypatch.chdir(files)
    run_blocks(page, subject=torch.rand(1, 24, 24, 24))


@pytest.mark.parametrize("name", ARTIFACTS)
def test_every_artifact_has_its_page(name):
    page = (DOCS / f"{name}.md").read_text()
    assert f"]({name}.png)" in page
    assert (DOCS / f"{name}.png").stat().st_size < 150_000
    assert blocks(f"docs/artifacts/{name}.md")
    for parameter in inspect.signature(ARTIFACTS[name]).parameters:
        assert parameter == "kwargs" or f"`{parameter}`" in page, parameter
    for named in (ARTIFACTS[name].__name__, ARTIFACTS[name].final.__name__, ARTIFACTS[name].final.kernel.__name__):
        assert f"`{named}`" in page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r'(?:\]\(|src=")([^)"]+)', (ROOT / page).read_text()):
        if not link.startswith("https://"):
            name, _, place = link.partition("#")
            target = (ROOT / page).parent / name if name else ROOT / page
            assert target.exists(), link
            assert not place or place in headings(target), link


def headings(page):
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


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
