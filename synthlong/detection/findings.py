"""New lesions as they lie in the follow-up's own scan: mask, list, and the files of both.

Detection, Visits -> findings_of -> Findings -> write_findings -> MASK.nii.gz, MASK.json
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

import synthlong
from synthlong.detection.inference import Detection
from synthlong.detection.sheet import sheet_of
from synthlong.detection.visits import Visits
from synthlong.errors import ConfigError, InputWarning, short
from synthlong.nifti import sidecar_of, write_nifti
from synthlong.pictures import png_bytes
from synthlong.publishing import check_place, publish
from synthlong.resampling import carry_labels, resample

__all__ = ["Finding", "Findings", "check_places", "findings_of", "write_findings"]


@dataclass(frozen=True)
class Finding:
    """One new lesion in the follow-up's scan; its probabilities are those on the grid that the networks saw.

    Args:
        number: Its label in `Detection.labels` and its row of the sheet: 1 is the largest on the grid of both visits.
        volume_mm3: In the scan's voxels.
        voxels: How many.
        centre_mni_mm: Centre of mass in MNI space (RAS).
        centre_scan_mm: That of the scan's voxels, in the scan's space (RAS).
        centre_voxel: The same as voxel indices, from 0 on.
        probability: Mean over the lesion.
        highest_probability: The highest of it.
    """

    number: int
    volume_mm3: float
    voxels: int
    centre_mni_mm: tuple[float, float, float]
    centre_scan_mm: tuple[float, float, float]
    centre_voxel: tuple[float, float, float]
    probability: float
    highest_probability: float


@dataclass(frozen=True, eq=False)
class Findings:
    """New lesions on the grid of the follow-up's scan.

    Args:
        mask: uint8, 1 in a new lesion.
        lesions: By number; each voxel of the mask belongs to exactly one.
    """

    mask: NDArray[np.uint8]
    lesions: tuple[Finding, ...]

    @property
    def volume_mm3(self) -> float:
        """Of all of them."""
        return round(sum(lesion.volume_mm3 for lesion in self.lesions), 3)


def findings_of(detection: Detection, visits: Visits) -> Findings:
    """Carry new lesions to the follow-up's scan, each with its volume; see `resampling.carry_labels`.

    Where two come to share voxels, those are the smaller one's. A lesion that is left without a voxel, because an
    even smaller one has it or because it lies beyond the scan, is told by a warning.
    """
    labels = carry_labels(detection.labels, visits.step, visits.grid.shape)
    boxes = ndimage.find_objects(labels, max_label=len(detection.lesions))
    affine = visits.grid.affine
    lesions = []
    for number, (box, lesion) in enumerate(zip(boxes, detection.lesions, strict=True), start=1):
        if box is None:
            where = ", ".join(f"{x:.0f}" for x in lesion.centre_mm)
            text = (
                f"the new lesion of {lesion.volume_mm3:g} mm3 at MNI ({where}) mm has no voxel of its own in the scan"
            )
            warnings.warn(f"{short(visits.scan.path)}: {text}", InputWarning, stacklevel=2)
            continue
        own = labels[box] == number
        centre = np.argwhere(own).mean(axis=0) + [s.start for s in box]
        voxels = int(own.sum())
        lesions.append(
            Finding(
                number,
                round(voxels * visits.grid.voxel_mm3, 3),
                voxels,
                lesion.centre_mm,
                _rounded(affine[:3, :3] @ centre + affine[:3, 3]),
                _rounded(centre),
                lesion.probability,
                lesion.highest_probability,
            )
        )
    return Findings((labels > 0).astype(np.uint8), tuple(lesions))


def _rounded(point: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = point.round(2).tolist()
    return x, y, z


def check_places(
    out: Path, *, inputs: Sequence[Path], probability: Path | None = None, picture: Path | None = None
) -> None:
    """Say what is wrong with the names of the files to come before the work, not after.

    Args:
        out: The mask; its JSON will lie beside it.
        inputs: Files that must stay, as must the JSON of each.
        probability: The map.
        picture: The sheet.

    Raises:
        ConfigError: A name without the right ending, or of another of these files.
        OutputError: A folder that does not exist or cannot be written to.
    """
    for option, path, endings in (
        ("-o", out, (".nii.gz", ".nii")),
        ("--probability", probability, (".nii.gz", ".nii")),
        ("--picture", picture, (".png",)),
    ):
        if path is None:
            continue
        if not path.name.endswith(endings) or path.name in endings:
            raise ConfigError(f"{option} {path.name}: must be named *{' or *'.join(endings)}")
        check_place(path)
    taken = {path.resolve() for given in inputs for path in (given, sidecar_of(given))}
    for path in (out, sidecar_of(out), probability, picture):
        if path is None:
            continue
        if path.resolve() in taken:
            raise ConfigError(f"{short(path)}: would overwrite a file that is used here too; choose another name")
        taken.add(path.resolve())


def write_findings(
    out: Path,
    detection: Detection,
    visits: Visits,
    *,
    settings: Mapping[str, Any],
    probability: Path | None = None,
    picture: Path | None = None,
) -> Findings:
    """Write new lesions on the grid of the follow-up's scan, voxel for voxel over it.

    Args:
        out: Mask, uint8; the JSON beside it says where each lesion is and what all was made of.
        detection: What was found.
        visits: Where.
        settings: How, as plain JSON.
        probability: Map to write, float32, interpolated linearly.
        picture: Sheet to write; see `sheet.sheet_of`.

    Raises:
        OutputError: A place that cannot be written to.
    """
    findings = findings_of(detection, visits)
    affine, scan = visits.grid.affine, visits.scan
    plain = {
        "synthlong": synthlong.__version__,
        "baseline": visits.about[0],
        "followup": visits.about[1],
        "prepared": visits.prepared,
        **settings,
        "new_lesions": len(findings.lesions),
        "volume_mm3": findings.volume_mm3,
        "lesions": [asdict(lesion) for lesion in findings.lesions],
    }
    sheet = png_bytes(sheet_of(visits.baseline, visits.followup, detection)) if picture else None
    sidecar = sidecar_of(out)
    sidecar.unlink(missing_ok=True)  # that of an earlier mask; written last, it says that all is there
    if picture and sheet:
        publish(picture, sheet)
    if probability is not None:
        chance = resample(detection.probability, visits.step, visits.grid.shape, order=1)
        write_nifti(probability, np.clip(chance, 0, 1), affine, like=scan)
    write_nifti(out, findings.mask, affine, like=scan)
    publish(sidecar, (json.dumps(plain, indent=1, allow_nan=False) + "\n").encode())
    return findings
