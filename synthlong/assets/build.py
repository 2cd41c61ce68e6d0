"""Rebuild the shipped assets: `python -m synthlong.assets.build ASSET [DATA] [-o FOLDER]`.

ASSET is prior, score (the table in `prior.md`), tissue, bank, cases or manifest (`training.csv` for `synthlong fit`).
DATA is the folder of real data described in `ATTRIBUTION.md`; `tissue` needs nilearn instead of it.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from synthlong import atlas, bank, prior
from synthlong.case import read_case
from synthlong.nifti import read_nifti

CASES = ("cs07", "cs19")
CSIM_PATIENTS = 46.0
CSIM_WEIGHT = 5.0  # what the shipped prior counts them as: `prior.md` says why
FLAIR_STEP = 1e-3
_MASKS = "*_desc-lesions_mask.nii.gz"
FWHMS_MM = (4.0, 6.0, 8.0, 10.0, 12.0, 16.0)


def build_tissue(out: Path) -> None:
    """Crop nilearn's ICBM 2009a symmetric maps to the MNI grid and store their left half in 6 bits.

    The maps equal their mirror exactly, so x = -91..0 is enough; the crop is by whole voxels.
    """
    from nilearn import datasets

    images = [
        datasets.load_mni152_gm_template(resolution=1),
        datasets.load_mni152_wm_template(resolution=1),
        datasets.load_mni152_brain_mask(resolution=1),
    ]
    gm, wm, mask = (
        atlas.sample_map(np.asanyarray(i.dataobj), i.affine, atlas.MNI_SHAPE, atlas.mni_affine()) for i in images
    )
    brain = mask > 0
    for volume in (gm, wm, brain):
        if not np.array_equal(volume[1:], atlas.mirror(volume)[1:]):
            raise SystemExit("nilearn's maps are not symmetric any more: store them whole")
    levels = atlas.TISSUE_LEVELS
    wm6 = np.rint(wm * levels).astype(np.uint8) * brain
    gm6 = np.minimum(np.rint(gm * levels).astype(np.uint8) * brain, levels - wm6)
    half = slice(0, 92)
    np.savez_compressed(out / "tissue.npz", gm=gm6[half], wm=wm6[half], brain=np.packbits(brain[half]))


def build_prior(data: Path, out: Path) -> None:
    """Build the shipped lesion frequency and store the logarithm of its left half in 8 bits."""
    frequency = prior.build_prior(_masks(data), background=(_csim(data), CSIM_WEIGHT))
    np.savez_compressed(out / "prior.npz", frequency=encode_log(prior.with_floor(frequency))[:92])


def encode_log(values: NDArray) -> NDArray[np.uint8]:
    """Code values in 0..1 in 8 bits: 0 below 1e-5, else 1 + 254 log(v / 1e-5) / log(1e5), rounded.

    A step is a factor of 1.046, so the relative error is up to 2.3 %.
    """
    coded = 1 + 254 * np.log(np.clip(values, atlas.LOG_MIN, atlas.LOG_MAX) / atlas.LOG_MIN) / np.log(
        atlas.LOG_MAX / atlas.LOG_MIN
    )
    return np.where(np.asarray(values) < atlas.LOG_MIN, 0, np.rint(coded)).astype(np.uint8)


def score_priors(data: Path) -> None:
    """Print the held-out log-likelihood of each way of building the prior, as a Markdown table."""
    masks, csim = list(_masks(data)), _csim(data)
    print("| sources | symmetric | FWHM (mm) | floor | all 26 | SEM | open_ms (24) | mslesseg (2) |")
    print("|---|---|---|---|---|---|---|---|")

    def row(sources: str, fwhm: float, both: bool, floor: float = 0.05, weight: float = CSIM_PATIENTS) -> None:
        score = held_out_log_likelihood(
            masks,
            use_masks="masks" in sources,
            background=(csim, weight) if "csim" in sources else None,
            fwhm_mm=fwhm,
            symmetric=both,
            floor=floor,
        )
        groups = [[v for s, v in score.per_patient.items() if s.startswith(g)] for g in ("sub-cs", "sub-ml")]
        cells = [f"{score.mean:.3f}", f"{score.sem:.3f}", *(f"{np.mean(g):.3f}" for g in groups)]
        shape = [f"{fwhm:g}", f"{floor:g}"] if floor < 1 else ["-", "1"]
        print("| " + " | ".join([sources, "yes" if both else "no", *shape, *cells]) + " |", flush=True)

    row("uniform over the brain", 0, True, floor=1.0)
    for fwhm in FWHMS_MM:
        for both in (False, True):
            for sources in ("csim", "masks", "masks + csim"):
                row(sources, fwhm, both)
    for weight in (5.0, 10.0, 20.0):
        row(f"masks + csim as {weight:g} patients", prior.FWHM_MM, True, weight=weight)
    for floor in (0.005, 0.02, 0.1):
        row(f"masks + csim as {CSIM_WEIGHT:g} patients", prior.FWHM_MM, True, floor, CSIM_WEIGHT)


class HeldOut(NamedTuple):
    """Log-likelihood (nats) per lesion voxel of patients that the prior has not seen."""

    mean: float
    sem: float
    per_patient: dict[str, float]
    outside: float
    """Share of all lesion voxels that lie outside the brain; they do not count."""


def held_out_log_likelihood(
    masks: prior.Subjects,
    *,
    use_masks: bool = True,
    background: tuple[NDArray, float] | None = None,
    fwhm_mm: float = prior.FWHM_MM,
    symmetric: bool = True,
    floor: float = prior.FLOOR,
) -> HeldOut:
    """Score a way of building the prior, leaving out one patient at a time.

    The prior from the other patients (and the background) becomes a density over the n voxels of the
    template's brain, (1 - floor) f / sum(f) + floor / n. A patient's score is the mean logarithm of it over
    the voxels of the patient's own mask (weighted by the share of visits that mark the voxel).

    Args:
        masks: As for `prior.build_prior`.
        use_masks: False scores the background alone, or without one the uniform density.
        background: As for `prior.build_prior`; its patients are never left out.
        fwhm_mm: As for `prior.build_prior`.
        symmetric: As for `prior.build_prior`.
        floor: Share of the density that is spread evenly over the brain, in (0, 1]; 1 is uniform.
    """
    means = prior.patient_means(masks)
    brain, _ = prior.brain_and_rim()
    total = np.zeros(atlas.MNI_SHAPE, np.float32)
    if background is not None:
        weighted = np.float32(background[1]) * np.asarray(background[0], np.float32)
        total += prior.smoothed(weighted, fwhm_mm, symmetric)
    smooth = {s: prior.smoothed(m, fwhm_mm, symmetric)[brain] for s, m in means.items()} if use_masks else {}
    everyone = total[brain] + sum(smooth.values(), np.zeros(1, np.float32))
    scores, lost, count = {}, 0.0, 0.0
    for subject, mean in means.items():
        frequency = np.maximum(everyone - smooth.get(subject, np.float32(0)), 0).astype(np.float64)
        density = np.full(frequency.size, floor / frequency.size)
        if (mass := frequency.sum()) > 0:
            density += (1 - floor) * frequency / mass
        else:
            density /= floor
        weight = mean[brain]
        scores[subject] = float(weight @ np.log(density) / weight.sum())
        count, lost = count + float(mean.sum()), lost + float(mean[~brain].sum())
    values = np.array(list(scores.values()))
    return HeldOut(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))), scores, lost / count)


def _masks(data: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    found = [*sorted(data.glob(f"open_ms/cross_sectional/{_MASKS}")), *sorted(data.glob(f"mslesseg/{_MASKS}"))]
    return map(prior.read_mask, found)


def _csim(data: Path) -> NDArray[np.float32]:
    volume = read_nifti(data / "csim" / "prior_46_patients.nii.gz")
    return atlas.sample_map(volume.data, volume.affine, atlas.MNI_SHAPE, atlas.mni_affine())


def build_bank(data: Path, out: Path) -> None:
    """Build the shipped lesion bank: shapes of `open_ms` masks and of `csim`, profiles of all labelled scans."""
    affine = atlas.mni_affine()
    shapes = []
    for path in sorted(data.glob("open_ms/cross_sectional/*desc-lesions_mask.nii.gz")):
        shapes += bank.shapes_in(read_nifti(path, allow_empty=True).data[::-1], affine)  # stored LAS
    with np.load(data / "csim" / "lesions.npz", allow_pickle=False) as z:
        for n, (first, sides, end) in enumerate(zip(z["offset"], z["shape"], z["end"], strict=True)):
            start = z["end"][n - 1] if n else 0
            flat = np.unpackbits(z["bits"][start:end])[: int(np.prod(sides))]
            first = np.asarray(first, np.int64)
            first[0] = atlas.MNI_SHAPE[0] - first[0] - sides[0]  # stored LAS, as the masks
            if shape := bank.shape_of(flat.reshape(sides).astype(bool)[::-1], first, affine):
                shapes.append(shape)
    masks = [(m, m.with_name(m.name.replace("desc-lesions_mask", "FLAIR"))) for m in sorted(data.rglob(_MASKS))]
    labelled = bank.build_bank(read_case(flair, mask) for mask, flair in masks if flair.exists())
    of_all = bank.LesionBank.from_shapes(bank.distinct(shapes), labelled.profiles)
    bank.write_bank(of_all, out / "lesion_bank.npz")


def build_cases(data: Path, out: Path) -> None:
    """Copy the two CC BY cases, FLAIR as int16 with a scale factor, masks as uint8, blank header text."""
    folder = out / "cases"
    folder.mkdir(exist_ok=True)
    lines = ["subject,flair,mask"]
    for case in CASES:
        flair, mask = (f"sub-{case}_space-MNI152_{kind}.nii.gz" for kind in ("FLAIR", "desc-lesions_mask"))
        lines.append(f"{case},{flair},{mask}")
        for name in (flair, mask):
            source = nib.load(data / "open_ms" / "cross_sectional" / name)
            values = np.asanyarray(source.dataobj)
            coded, step = _coded(values) if name == flair else ((values > 0).astype(np.uint8), 1.0)
            header = nib.Nifti1Image(coded, source.affine).header
            header.set_xyzt_units("mm")
            header.set_sform(source.affine, code="mni")
            header.set_qform(source.affine, code="mni")
            header.set_slope_inter(step, 0.0)
            header["vox_offset"], header["magic"] = 352, b"n+1"
            raw = header.binaryblock + bytes(4) + coded.tobytes(order="F")
            (folder / name).write_bytes(gzip.compress(raw, 9, mtime=0))
    (folder / "cases.csv").write_text("\n".join(lines) + "\n")


def _coded(values: NDArray) -> tuple[NDArray[np.int16], float]:
    """Return int16 codes and their step, 0.1 % of the brain's mean (the error is half of it).

    Voxels that are not 0 stay so (at the cost of up to a step), because they are the brain.
    """
    step = float(np.float32(FLAIR_STEP * values[values != 0].mean()))
    codes = np.rint(values / step)
    return np.where((values != 0) & (codes == 0), np.sign(values), codes).astype(np.int16), step


def write_training_manifest(data: Path, out: Path) -> None:
    """Write `training.csv`: the labelled scans that the shipped weights were trained on."""
    lines = ["subject,session,flair,mask"]
    for flair in sorted([*data.glob("open_ms/cross_sectional/*_FLAIR.nii.gz"), *data.glob("mslesseg/*_FLAIR.nii.gz")]):
        subject, _, session = flair.name.split("_space-")[0].removesuffix("_FLAIR.nii.gz").partition("_ses-")
        mask = flair.with_name(flair.name.replace("FLAIR", "desc-lesions_mask"))
        lines.append(f"{subject.removeprefix('sub-')},{session},{flair.resolve()},{mask.resolve()}")
    (out / "training.csv").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Rebuild one asset."""
    parser = argparse.ArgumentParser(prog="python -m synthlong.assets.build", description=__doc__)
    parser.add_argument("asset", choices=["prior", "score", "tissue", "bank", "cases", "manifest"])
    parser.add_argument("data", type=Path, nargs="?", help="folder of real data")
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parent, help="default: this folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.asset == "tissue":
        return build_tissue(args.out)
    if args.data is None:
        parser.error(f"{args.asset} needs the folder of real data")
    if args.asset == "prior":
        build_prior(args.data, args.out)
    elif args.asset == "score":
        score_priors(args.data)
    elif args.asset == "cases":
        build_cases(args.data, args.out)
    elif args.asset == "manifest":
        write_training_manifest(args.data, args.out)
    else:
        build_bank(args.data, args.out)
    return None


if __name__ == "__main__":
    main()
