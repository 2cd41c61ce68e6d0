"""Runs of every release so far, which this one must read: two pairs of the bundled cases, 16 voxels a side.

With the release's version installed: `synthlong generate cases.csv -o VERSION --pairs 2 --seed 1 --config c.toml`, of
`box = 16`, `around_events = 1.0`, `with_new_lesions = 1.0`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import h5py
import pytest

from synthlong.dataset.export import export_pairs
from synthlong.dataset.shards import ShardDataset
from synthlong.dataset.verify import verify
from synthlong.errors import InputError
from synthlong.recipe import Recipe
from synthlong.report import write_report

RUNS = Path(__file__).parent / "golden" / "releases"
DIGESTS = {
    "0.1.0": "887a9f66165d968624be8f0ecfb0a114f379460abf8c7aa2505976cc2f193e9e",
    "0.2.0": "6860c1d3639b37ec13a5340d3b68ddd0cf16384be118a5c7d8a5217a09ce574a",
    "0.3.0": "e2f699d91543f0da6af09dd640205c00b98471e95ba99aacd8ab246ffb679b2c",
    "0.4.0": "9d0e8e8f0b93b36922dee27ac07c032c802c9e545d1713944850d9e532235e8e",
    "0.5.0": "9d0e8e8f0b93b36922dee27ac07c032c802c9e545d1713944850d9e532235e8e",
}


def digest_of(dataset: ShardDataset) -> str:
    """SHA-256 of all that a run holds."""
    digest = hashlib.sha256()
    for sample in dataset:
        for name in sorted(sample):
            value = sample[name]
            digest.update(value.encode() if isinstance(value, str) else value.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("version", sorted(DIGESTS))
def test_a_run_of_an_earlier_release_is_read_checked_shown_and_exported(version: str, tmp_path: Path) -> None:
    run = RUNS / version
    if [int(n) for n in version.split(".")] < [0, 5] and h5py.version.hdf5_version_tuple < (2, 0, 0):
        with pytest.raises(InputError, match="install a newer h5py"):
            ShardDataset(run)[0]
        return
    dataset = ShardDataset(run)
    assert (len(dataset), digest_of(dataset)) == (2, DIGESTS[version])
    assert all(Recipe.from_json(sample["recipe"]).events for sample in dataset)
    assert not verify(run).problems
    write_report(run, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count("<figure") >= 2
    export_pairs(run, tmp_path / "nifti")
    assert len(list((tmp_path / "nifti").glob("sub-*/ses-*/anat/*_FLAIR.nii.gz"))) == 4
