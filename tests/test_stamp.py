from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from synthlong.preparation import PreparationConfig, Scan
from synthlong.preparation.stamp import changes, stamp_of

KAMRAOUI, SCHMIDT = PreparationConfig(), PreparationConfig(recipe="schmidt")


@pytest.fixture
def scan(tmp_path):
    """A scan whose forms of the header are one, with a mask and a T1w."""
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    image.set_qform(np.eye(4), 1)
    image.set_sform(np.eye(4), 1)
    for name in ("f", "m", "t"):
        nib.save(image, tmp_path / f"{name}.nii.gz")
    return Scan("a", tmp_path / "f.nii.gz", mask=tmp_path / "m.nii.gz", t1=tmp_path / "t.nii.gz")


def changed(scan, config, now, *, before=None, prefer=None, old=None):
    """What is otherwise with the config `now`; before, it was `config`, and none or `before` was preferred."""
    return changes(old or stamp_of([scan], config, before), stamp_of([scan], now, prefer), now)


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (KAMRAOUI, {"denoise": False}, ["denoise: True -> False"]),
        (KAMRAOUI, {"healthy": False}, ["healthy: True -> False"]),
        (KAMRAOUI, {"spacing_mm": 1.0}, []),
        (KAMRAOUI, {"precision": "float32"}, ["precision: bf16 -> float32"]),
        (replace(KAMRAOUI, precision="float32"), {"precision": "auto"}, []),
        (replace(KAMRAOUI, healthy=False), {"precision": "float32"}, []),
        (SCHMIDT, {"spacing_mm": 1.0}, ["spacing_mm: 0.5 -> 1.0"]),
        (SCHMIDT, {"denoise": False, "brain": "accurate", "healthy": False}, []),
    ],
)
def test_only_options_of_the_recipe_decide(scan, monkeypatch, config, options, said):
    monkeypatch.setattr("synthlong.networks.default_precision", lambda _: "bf16")
    assert changed(scan, config, replace(config, **options)) == said


def test_another_inpainter_decides_where_one_is_asked_for(scan, tmp_path):
    (tmp_path / "w").write_bytes(b"weights")
    own = replace(KAMRAOUI, inpainter=str(tmp_path / "w"))
    (said,) = changed(scan, KAMRAOUI, own)
    assert said.startswith("inpainter: ")
    assert changed(scan, own, KAMRAOUI) == []


def test_a_preference_decides_where_two_forms_disagree(scan):
    assert changed(scan, SCHMIDT, SCHMIDT, prefer="sform") == []
    image = nib.load(scan.flair)
    image.set_qform(np.diag([-1, 1, 1, 1]), 1)
    nib.save(image, scan.flair)
    assert changed(scan, SCHMIDT, SCHMIDT, before="sform", prefer="qform") == ["prefer: sform -> qform"]
    assert changed(scan, SCHMIDT, SCHMIDT, before="sform", prefer="sform") == []
    assert changed(scan, SCHMIDT, SCHMIDT, before="sform") == []  # neither is asked for


def test_files_that_the_recipe_reads_decide(scan):
    stamps = {config.recipe: stamp_of([scan], config, None) for config in (KAMRAOUI, SCHMIDT)}
    scan.t1.write_bytes(b"another")
    assert changed(scan, KAMRAOUI, KAMRAOUI, old=stamps["kamraoui"]) == ["another t1"]
    assert changed(scan, SCHMIDT, SCHMIDT, old=stamps["schmidt"]) == []
    assert changed(replace(scan, mask=None), SCHMIDT, SCHMIDT, old=stamps["schmidt"]) == ["another mask"]
    assert changed(replace(scan, session="2"), SCHMIDT, SCHMIDT, old=stamps["schmidt"]) == ["other visits"]


def test_versions_and_what_older_ones_recorded_decide_nothing(scan):
    stamp = stamp_of([scan], SCHMIDT, None)
    old = stamp | {"config": replace(SCHMIDT, denoise=False).as_dict(), "prefer": "sform", "versions": {"numpy": "1"}}
    old["scans"] = {"a": {**stamp["scans"]["a"], "t1": "0" * 64}}
    assert changed(scan, SCHMIDT, SCHMIDT, old=old) == []
    del old["config"]["visits"]  # as long as it has its default
    assert changed(scan, SCHMIDT, SCHMIDT, old=old) == []
    assert changed(scan, SCHMIDT, replace(SCHMIDT, visits="affine"), old=old) == ["visits: rigid -> affine"]
