"""What trainings read: a run whose new lesions are bright balls in noise, pairs of scans."""

import nibabel as nib
import numpy as np

from synthlong.dataset.index import write_index
from synthlong.dataset.plan import make_plan, shard_config
from synthlong.dataset.writer import Sample, write_shard
from synthlong.plain import canonical_json
from synthlong.publishing import publish
from synthlong.recipe import Box, Recipe
from synthlong.synthesis import SynthesisConfig

SCALING = ((0.5, 0.25), (0.75, 0.5))


def make_pair(k, *, side, subjects, placed):
    """Pair k: every second one of a subject has a ball."""
    rng = np.random.default_rng(k)
    shape = (side, side, side)
    baseline = rng.normal(1, 0.05, shape)
    distance = np.linalg.norm(np.indices(shape) - rng.integers(4, side - 4, (3, 1, 1, 1)), axis=0)
    new = ((distance < 3) & (k // subjects % 2 == 0)).astype(np.uint8)
    nothing = np.zeros(shape, np.uint8)
    recipe = Recipe(f"sub-{k % subjects}", Box((0, 0, 0), side, placed), (), scaling=SCALING)
    return Sample(
        baseline=baseline,
        followup=baseline + new,
        new_lesions=new,
        evolution=2 * new,
        lesions_baseline=nothing,
        lesions_followup=new,
        recipe=recipe.to_json(),
        subject=f"sub-{k % subjects}",
    )


def write_balls(out, *, pairs=16, side=16, subjects=4, uniform=lambda k: k // 4 % 4 < 2):
    """Write them as `generate` would; those that are not uniform lie around events."""
    cases = [{"subject": f"sub-{k}", "patient": f"sub-{k}", "sources": {}} for k in range(subjects)]
    options = {"pairs": pairs, "seed": 0, "shard_size": pairs, "config": SynthesisConfig(), "assets": {}}
    plan = make_plan(out / "cases.csv", out, cases=cases, **options)
    placed = ["uniform" if uniform(k) else "event" for k in range(pairs)]
    samples = [make_pair(k, side=side, subjects=subjects, placed=p) for k, p in enumerate(placed)]
    about = {"config_json": canonical_json(shard_config(plan)), "versions_json": canonical_json(plan["versions"])}
    sidecar = write_shard(out, 0, samples, first_index=0, compression="blosc-lz4", **about)
    publish(out / "run.json", canonical_json(plan).encode())
    write_index(out, plan["run_id"], [sidecar])
    return out


def write_scans(folder, manifest):
    """Three patients: boxes of a real scan, the follow-up brighter in the mask; the last one has nothing new."""
    lines = ["subject,baseline,followup,mask"]
    mask = nib.load(manifest.parent / "cs07_mask.nii.gz")
    scan = nib.load(manifest.parent / "cs07_FLAIR.nii.gz")
    for name, share in (("a", 1), ("b", 1), ("c", 0)):
        new = (mask.get_fdata() > 0) * share
        nib.save(nib.Nifti1Image(new.astype(np.uint8), mask.affine), folder / f"{name}_new.nii.gz")
        lines.append(f"{name},../{manifest.parent.name}/cs07_FLAIR.nii.gz,{name}_followup.nii.gz,{name}_new.nii.gz")
        data = scan.get_fdata() * (1 + 0.2 * new)
        nib.save(nib.Nifti1Image(data.astype(np.float32), scan.affine), folder / f"{name}_followup.nii.gz")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"
