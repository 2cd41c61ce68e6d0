"""Train the detectors that the package ships, from single visits only; no real pair of visits is seen.

    python examples/train_detectors.py DATA -o work
    python examples/train_detectors.py DATA -o other --painter copypaste    # or --artifacts none: to compare

DATA holds `open_ms` (CC BY, doi 10.1007/s12021-017-9348-7 and 10.1007/s12021-016-9301-1) and `mslesseg`
(Sci. Data 12:920). Six scans of four patients come with lesion masks in MNI space. Three more, raw, of patients without
a mask, are prepared; what is bright in their white matter is taken for lesions: a new lesion's mask is exact whatever
they really are, and slices of 3-4 mm are what clinics have. Each command is printed, and goes on where it was stopped.
On two cores of an Intel Xeon with AMX: 5 minutes to prepare, 14 for the pairs, 51 for `ConcatUNet` and, at the same
time, 83 for both stages of `SiameseUNet` (all beside other work).
"""

import argparse
import csv
import json
import os
import shlex
import subprocess
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy import ndimage

from synthlong.atlas import lesion_prior, sample_map
from synthlong.nifti import read_nifti, write_nifti

MASKED = (
    "open_ms/cross_sectional/sub-cs07_space-MNI152",
    "open_ms/cross_sectional/sub-cs19_space-MNI152",
    "mslesseg/sub-ml14_ses-1",
    "mslesseg/sub-ml14_ses-2",
    "mslesseg/sub-ml14_ses-3",
    "mslesseg/sub-ml39_ses-1",
)
UNMASKED = ("sub-lo04_ses-1", "sub-lo09_ses-2", "sub-lo20_ses-2")

LICENCE = "open_ms: CC BY; mslesseg: listed as CC BY 4.0"

PAIRS = tomllib.loads(Path(__file__).with_name("detector_pairs.toml").read_text())

SHARED: dict[str, object] = {"learning_rate": 1e-3, "loss": "bce+dice", "checkpoint_every": 50}
CONCAT = {**SHARED, "folds": 1, "batch": 8, "side": 32, "steps": 5000, "report_every": 1000}
CONCAT |= {"mining": False, "positive_share": 0.8, "window": 64}
"""All patients are learned from, and the last weights kept: one patient held out would be too few to choose by. Most
patches have a new lesion: with fewer, real ones, often fainter than those made here, get probabilities below 0.5."""

STAGE = {**SHARED, "folds": 7, "batch": 4, "side": 48, "report_every": 200, "schedule": "cosine"}
SEGMENT = {**STAGE, "steps": 2400, "validation_patches": 32}
SIAMESE = {**STAGE, "steps": 1600, "validation_patches": 48, "trainable": "all", "loss": "dice"}

BRIGHT = 1.3
"""Of the brain's mode: what is brighter, deep in the brain and where lesions are not rare, is taken for a lesion."""


def run(work: Path, *words: object) -> None:
    """Print a command and run it in a folder."""
    command = ["synthlong", *(str(word) for word in words)]
    print("$", shlex.join(command), flush=True)
    subprocess.run(command, check=True, cwd=work)


def train(work: Path, name: str, stage: str, *words: object) -> None:
    """Train; what was finished stays."""
    out, config = f"{name}.safetensors", f"{name}.toml"
    run(work, "train", stage, *words, "-o", out, "--config", config, "--threads", 1, "--licence", LICENCE)


def bright_spots(flair: Path) -> np.ndarray:
    """Return the bright spots of 8 voxels or more, 8 voxels below the brain's surface, in a prepared scan."""
    scan = read_nifti(flair)
    frequency, affine = lesion_prior()
    prior = sample_map(frequency, affine, scan.data.shape, scan.affine)
    inner = ndimage.binary_erosion(scan.data > 0, iterations=8) & (prior > np.quantile(prior[prior > 0], 0.4))
    labels, _ = ndimage.label((ndimage.gaussian_filter(scan.data, 0.5) > BRIGHT) & inner, np.ones((3, 3, 3)))
    large = np.bincount(labels.ravel()) >= 8
    large[0] = False
    return large[labels].astype(np.uint8)


def write_cases(data: Path, work: Path) -> None:
    """Prepare the raw scans, mark their bright spots, and list all cases."""
    folder = data / "open_ms" / "longitudinal"
    raw = [{"subject": n[4:8], "session": n[-1], "flair": folder / f"{n}_FLAIR.nii.gz"} for n in UNMASKED]
    write_csv(work / "raw.csv", raw)
    run(work, "prepare", "raw.csv", "-o", "prepared")
    cases = []
    for stem in MASKED:
        subject, _, session = Path(stem).name.partition("_ses-")
        flair, mask = (data / f"{stem}_{kind}.nii.gz" for kind in ("FLAIR", "desc-lesions_mask"))
        cases.append({"subject": subject[4:8], "session": session, "flair": flair, "mask": mask})
    for name in UNMASKED:
        flair, mask = work / "prepared" / f"{name}_space-MNI152_FLAIR.nii.gz", work / f"{name}_desc-bright_mask.nii.gz"
        write_nifti(mask, bright_spots(flair), read_nifti(flair).affine)
        cases.append({"subject": name[4:8], "session": name[-1], "flair": flair, "mask": mask})
    write_csv(work / "cases.csv", cases)


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        for row in rows:
            table.writerow({k: os.path.relpath(v, path.parent) if isinstance(v, Path) else v for k, v in row.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--painter", default="network", choices=("network", "copypaste", "ellipsoid"))
    parser.add_argument("--artifacts", default="clinical", choices=("clinical", "mild", "kamraoui", "none"))
    options = parser.parse_args()
    work = options.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    write_cases(options.data.resolve(), work)
    made = PAIRS | {"painter": options.painter, "artifacts": options.artifacts}
    stage_one = SEGMENT | {"artifacts": options.artifacts}
    for name, config in (("pairs", made), ("concat", CONCAT), ("segment", stage_one), ("siamese", SIAMESE)):
        (work / f"{name}.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in config.items()))
    run(work, "generate", "cases.csv", "-o", "pairs", "--pairs", 5000, "--seed", 7, "--config", "pairs.toml")
    with ThreadPoolExecutor() as both:
        concat = both.submit(train, work, "concat", "ohem", "pairs")
        train(work, "segment", "segment", "cases.csv")
        train(work, "siamese", "pretrain", "pairs", "--encoder", "segment.safetensors")
    concat.result()


if __name__ == "__main__":
    main()
