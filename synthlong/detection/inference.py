"""Where new lesions are.

    two Cases -> networks slide over them -> where their mean exceeds 0.5 -> Detection

(Schmidt-Mengin et al. 2022, section 2.2). No rule on intensities comes after the networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

import synthlong
from synthlong.case import Case
from synthlong.detection.networks import ConcatUNet, LongitudinalUNet, SiameseUNet
from synthlong.detection.sliding import ensemble_of, probability_map
from synthlong.detection.visits import check_same_grid, in_common_brain
from synthlong.errors import ConfigError, InputError
from synthlong.progress import Progress
from synthlong.weights import read_weights

__all__ = [
    "DEFAULT_DETECTOR",
    "DetectedLesion",
    "Detection",
    "check_limits",
    "detect",
    "read_detectors",
    "shipped_detector",
]

DEFAULT_DETECTOR = ConcatUNet.task
"""Which of the shipped networks is used where none is named."""


@dataclass(frozen=True)
class DetectedLesion:
    """One new lesion: 6-connected, as the scores of MSSEG-2 count lesions.

    Args:
        volume_mm3: Its volume.
        voxels: The same in voxels.
        centre_mm: Its centre of mass in MNI space (RAS).
        probability: Mean over its voxels.
        highest_probability: The highest of them.
    """

    volume_mm3: float
    voxels: int
    centre_mm: tuple[float, float, float]
    probability: float
    highest_probability: float


@dataclass(frozen=True, eq=False)
class Detection:
    """New lesions of a follow-up, on its grid.

    Args:
        labels: int32 `(I, J, K)`, n in the n-th of `lesions`, 0 elsewhere.
        probability: float32 `(I, J, K)`, 0 outside the brain.
        lesions: Largest first.
    """

    labels: NDArray[np.int32]
    probability: NDArray[np.float32]
    lesions: tuple[DetectedLesion, ...]

    @property
    def mask(self) -> NDArray[np.uint8]:
        """1 in a new lesion."""
        return (self.labels > 0).astype(np.uint8)


def detect(
    baseline: Case,
    followup: Case,
    networks: LongitudinalUNet | Sequence[LongitudinalUNet],
    *,
    threshold: float = 0.5,
    min_volume_mm3: float = 3.0,
    window: int | None = None,
    mirrored: bool = True,
    precision: str = "auto",
    device: str = "cpu",
    progress: Progress | None = None,
) -> Detection:
    """Find the lesions of the follow-up that the baseline does not have.

    The networks see what is brain in both visits, nothing else: `visits.in_common_brain`. The windows begin at that
    brain's bounding box: over the MNI grid, 64^3 windows would be three times as many.

    Args:
        baseline: First visit.
        followup: Second visit, on the same grid.
        networks: One network, or an ensemble of one kind; see `read_detectors`.
        threshold: A voxel belongs to a new lesion where the probability is higher.
        min_volume_mm3: Lesions of this volume or less are dropped; 0 keeps all.
        window: See `probability_map`.
        mirrored: See `probability_map`; twice the time, and a little better on real pairs.
        precision: See `probability_map`.
        device: Torch device.
        progress: Called as (stage, done, total).

    Raises:
        InputError: The visits lie on different grids, or their brains do not meet.
        ConfigError: An option outside its range.
    """
    check_same_grid(baseline, followup)
    check_limits(threshold, min_volume_mm3)
    visits = in_common_brain(baseline, followup)
    brain = visits[0].brain
    box = ndimage.find_objects(brain)[0]
    networks = ensemble_of(networks)
    normalised = networks[0].normalised
    before, after = (normalised(visit.flair)[box] for visit in visits)
    probability = np.zeros(brain.shape, np.float32)
    probability[box] = probability_map(
        networks,
        before,
        after,
        brain[box],
        window=window,
        mirrored=mirrored,
        threshold=threshold,
        precision=precision,
        device=device,
        progress=progress,
    )
    return _detection(probability, followup.affine, threshold=threshold, min_volume_mm3=min_volume_mm3)


def check_limits(threshold: float, min_volume_mm3: float) -> None:
    """Raise a ConfigError if one of the limits of `detect` is outside its range."""
    if not 0 <= threshold < 1:
        raise ConfigError(f"threshold = {threshold}: must be from 0 to below 1")
    if not min_volume_mm3 >= 0:
        raise ConfigError(f"min_volume_mm3 = {min_volume_mm3}: must be 0 or more")


def read_detectors(paths: str | Path | Sequence[str | Path] = ()) -> tuple[LongitudinalUNet, ...]:
    """Read the weights of one network, or of an ensemble of one kind; without paths, of `shipped_detector`.

    Args:
        paths: One `.safetensors` file, or several.

    Raises:
        InputError: See `read_weights`; or the networks are of different kinds.
    """
    networks: list[LongitudinalUNet] = []
    for path in [paths] if isinstance(paths, str | Path) else paths or [shipped_detector()]:
        network, _ = read_weights(path, task=(ConcatUNet.task, SiameseUNet.task))
        assert isinstance(network, LongitudinalUNet)
        if networks and type(network) is not type(networks[0]):
            problem = f"weights of the {network.task}, beside those of the {networks[0].task}"
            raise InputError(path, problem, "pass weights of one kind")
        networks.append(network)
    return tuple(networks)


def shipped_detector(name: str = DEFAULT_DETECTOR) -> Path:
    """Return the path of shipped weights, "concat" or "siamese"."""
    return Path(synthlong.__file__).parent / "assets" / f"{name}.safetensors"


def _detection(
    probability: NDArray[np.float32], affine: NDArray[np.float64], *, threshold: float, min_volume_mm3: float
) -> Detection:
    """List the 6-connected lesions above a threshold, leaving out small ones."""
    labels, count = ndimage.label(probability > threshold)
    voxel_mm3 = float(abs(np.linalg.det(affine[:3, :3])))
    found = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        own = labels[box] == number
        voxels = int(own.sum())
        if voxels * voxel_mm3 <= min_volume_mm3:
            continue
        inside = probability[box][own]
        where = np.argwhere(own).mean(axis=0) + [s.start for s in box]
        x, y, z = (affine[:3, :3] @ where + affine[:3, 3]).round(2).tolist()
        highest = round(float(inside.max()), 4)
        mean = round(float(inside.mean(dtype=np.float64)), 4)
        found.append((DetectedLesion(round(voxels * voxel_mm3, 3), voxels, (x, y, z), mean, highest), number))
    found.sort(key=lambda pair: -pair[0].voxels)
    ranks = np.zeros(count + 1, np.int32)
    ranks[[number for _, number in found]] = np.arange(1, len(found) + 1)
    return Detection(ranks[labels], probability, tuple(lesion for lesion, _ in found))
