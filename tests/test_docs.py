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
from tests import options_page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "artifacts"
PAGES = sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
OF_A_RUN = ("README.md", "docs/detection.md", "docs/evaluation.md", "docs/own-networks.md", "docs/shards.md")
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
    """A folder with what the pages read: scans, masks, and a run of four pairs under two names."""
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
    (folder / "pairs-2").symlink_to("pairs")
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


def test_every_file_is_on_the_map():
    page = (ROOT / "docs" / "architecture.md").read_text()
    there = [path.relative_to(ROOT).as_posix() for room in ("synthlong", "cli") for path in (ROOT / room).rglob("*.py")]
    named = {name.removeprefix("synthlong/") for name in there if not name.endswith("__init__.py")}
    assert named == set(re.findall(r"`([\w/]+\.py)`", page.partition("\n## ")[0]))


def test_the_options_are_those_of_the_code():
    assert options_page.PAGE.read_text() == options_page.page(), "python tests/options_page.py writes it again"


@pytest.mark.parametrize("config", options_page.SECTIONS.values())
def test_what_the_options_allow_is_taken(config):
    for option in fields(config):
        for value in re.findall(r'`("[^`]+"|true|false)`', options_page.allowed(config, option.name)):
            config(**{option.name: json.loads(value)})
