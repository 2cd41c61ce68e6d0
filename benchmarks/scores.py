"""Time of `lesion_scores` on pairs of 182 x 218 x 182 voxels, and of its distance map beside SciPy's.

    OMP_NUM_THREADS=1 python benchmarks/scores.py [--repeats 7]

Scattered lesions are the two bundled scans' masks, of 1.3 and 50 ml; the blob is a ball of 1500 ml. Median seconds,
and in parentheses the fastest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from synthlong.atlas import ASSETS, MNI_SHAPE
from synthlong.detection import lesion_scores
from synthlong.detection.distance import distance_mm
from synthlong.nifti import read_nifti

MM = (1.0, 1.0, 1.0)


def seconds(call: Callable[[], object], repeats: int) -> str:
    call()  # compiles
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return f"{statistics.median(times):6.3f} s ({min(times):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    stem = ASSETS / "cases" / "sub-{}_space-MNI152_desc-lesions_mask.nii.gz"
    few, many = (read_nifti(str(stem).format(subject)).data > 0 for subject in ("cs07", "cs19"))
    radius = np.linalg.norm(np.indices(MNI_SHAPE) - np.reshape(MNI_SHAPE, (3, 1, 1, 1)) / 2, axis=0)
    blob, nothing = radius < 71, np.zeros(MNI_SHAPE, bool)
    for name, truth, prediction in (
        ("no lesion against 1.3 ml", nothing, few),
        ("1.3 ml against 50 ml", few, many),
        ("50 ml against 50 ml, shifted by a voxel", many, np.roll(many, 1, axis=0)),
        ("50 ml against 1500 ml", many, blob),
    ):
        print(f"{name:42}{seconds(lambda t=truth, p=prediction: lesion_scores(t, p, MM), repeats)}", flush=True)
    for name, mask in (("50 ml", many), ("1500 ml", blob)):
        print(f"{'distance map of ' + name:42}{seconds(lambda m=mask: distance_mm(m, np.array(MM)), repeats)}")
        print(f"{'SciPy':42}{seconds(lambda m=mask: ndimage.distance_transform_edt(~m, sampling=MM), repeats)}")


if __name__ == "__main__":
    main()
