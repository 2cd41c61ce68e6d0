import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ASSETS = {"prior.npz", "tissue.npz", "lesion_bank.npz"} | {
    f"{name}.safetensors" for name in ("inpainter", "generator", "siamese", "concat")
}


def test_packages_are_the_folders():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(p.parent.relative_to(ROOT).parts).replace("cli", "synthlong_cli")
        for top in ("synthlong", "cli")
        for p in (ROOT / top).rglob("__init__.py")
    }
    assert listed == found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_asset_and_nothing_called_cli(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"synthlong", "synthlong_cli"}
    assert {f"synthlong/assets/{a}" for a in ASSETS} <= set(names)
    assert "synthlong/assets/ATTRIBUTION.md" in names
    assert sum(name.startswith("synthlong/assets/cases/") for name in names) == 5


def test_assets_open_from_an_installed_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = """
import sys; sys.path.insert(0, sys.argv[1])
import synthlong, synthlong.detection, synthlong.preparation; assert synthlong.__file__.startswith(sys.argv[1])
from synthlong.atlas import lesion_prior, tissue_maps
from synthlong.dataset.assets import asset_hashes
from synthlong.dataset.plan import bundled_cases
from synthlong.dataset.assets import synthesis_of
from synthlong.manifest import find_cases
from synthlong.synthesis import SynthesisConfig
lesion_prior(), tissue_maps(), asset_hashes(SynthesisConfig()), synthesis_of(SynthesisConfig(precision="float32"))
assert [c.subject for c in find_cases(bundled_cases())] == ["cs07", "cs19"]
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tmp_path, timeout=120)


def test_shipped_weights_are_those_of_their_cards():
    import hashlib
    import json

    for name, settings in (("inpainter", "fit"), ("generator", "fit"), ("siamese", "train"), ("concat", "train")):
        card = json.loads((ROOT / "synthlong" / "assets" / f"{name}.json").read_text())
        data = (ROOT / "synthlong" / "assets" / f"{name}.safetensors").read_bytes()
        assert hashlib.sha256(data).hexdigest() == card["sha256"]
        assert {"command", "licence", "patients", "held_out", "curve", settings} <= card.keys()
        assert len(data) < 10e6
