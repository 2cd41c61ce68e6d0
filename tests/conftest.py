import csv
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from synthlong import networks
from synthlong.atlas import ASSETS
from synthlong.case import Case, read_case
from synthlong.errors import InputWarning


def _write_volume(path, data, affine, *, sform=4, qform=4, descrip=""):
    """Write with nibabel, the independent writer; return the path."""
    data = data.astype(np.uint8) if data.dtype == bool else data
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    image.header["descrip"] = descrip.encode()
    nib.save(image, path)
    return Path(path)


@pytest.fixture(scope="module")
def one_thread():
    """One torch thread: results do not depend on the machine, and small tensors do not wait for threads."""
    with networks.one_thread():
        yield


@pytest.fixture(scope="session")
def write_volume():
    """`write_volume(path, data, affine, *, sform=4, qform=4, descrip="")`; the codes may be 0."""
    return _write_volume


def _bundled(subject):
    stem = ASSETS / "cases" / f"sub-{subject}_space-MNI152"
    return Path(f"{stem}_FLAIR.nii.gz"), Path(f"{stem}_desc-lesions_mask.nii.gz")


@pytest.fixture(scope="session")
def bundled():
    """`bundled("cs07")` gives the paths of a bundled scan and its mask."""
    return _bundled


CROP = (44, 48, 40)


@pytest.fixture(scope="session")
def manifest(tmp_path_factory, bundled):
    """Two patients: boxes of the bundled scans around their densest lesions, as NIfTI, and their manifest."""
    folder = tmp_path_factory.mktemp("cases")
    with open(folder / "cases.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["subject", "flair", "mask"])
        for subject in ("cs19", "cs07"):
            flair, mask = (nib.load(p) for p in bundled(subject))
            where = np.argwhere(mask.get_fdata() > 0).mean(axis=0).astype(int)
            start = np.clip(where - np.array(CROP) // 2, 0, np.array(flair.shape) - CROP)
            box = tuple(slice(a, a + n) for a, n in zip(start, CROP, strict=True))
            for name, image in (("FLAIR", flair), ("mask", mask)):
                nib.save(image.slicer[box], folder / f"{subject}_{name}.nii.gz")
            rows.writerow([subject, f"{subject}_FLAIR.nii.gz", f"{subject}_mask.nii.gz"])
    return folder / "cases.csv"


@pytest.fixture(scope="session")
def real_case():
    """The bundled cs07, read from its files; shared, so not to be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        case = read_case(*_bundled("cs07"))
    for array in (case.flair, case.lesions, case.brain, case.tissue, case.affine):
        array.flags.writeable = False
    return case


@pytest.fixture
def small_case():
    """A brain ball in 40^3: CSF within 5 mm, white matter to 11 with three lesions, gray matter to 17."""
    rng = np.random.default_rng(7)
    grid = np.indices((40, 40, 40)) - 20.0
    radius = np.linalg.norm(grid, axis=0)
    tissue = np.digitize(radius, (5, 11, 17)).astype(np.uint8)
    tissue = np.array([1, 3, 2, 0], np.uint8)[tissue]
    texture = np.array([0, 0.3, 1.0, 0.9])[tissue]
    healthy = np.where(tissue > 0, texture + rng.normal(0, 0.02, texture.shape), 0).astype(np.float32)
    lesions = np.zeros(tissue.shape, np.uint8)
    for centre, size in (((8, 0, 0), 2.1), ((0, -8, 0), 2.5), ((0, 0, 8), 1.5)):
        lesions[np.linalg.norm(grid - np.reshape(centre, (3, 1, 1, 1)), axis=0) <= size] = 1
    affine = np.eye(4)
    affine[:3, 3] = (-30, -30, 10)
    return Case(
        id="small",
        flair=np.where(lesions, healthy + np.float32(0.6), healthy),
        lesions=lesions,
        brain=(tissue > 0).astype(np.uint8),
        tissue=tissue,
        affine=affine,
        healthy=healthy,
        scan_mean=float(healthy.mean()),
        scan_sd=float(healthy.std()),
    )
