"""How real the synthesis is: removal, painting, and a classifier's view, on patients that the weights have not seen.

    python -m benchmarks.realism training.csv -o OUT [--weights FOLDER ...] [--quick]

`training.csv` is a manifest of labelled scans (`python -m synthlong.assets.build manifest DATA -o .`). Each FOLDER
holds `inpainter.safetensors` and `generator.safetensors` with their cards, which say whom they were trained on; they
are measured on the manifest's other patients. Without it: the shipped weights. Writes `realism.txt` (the tables),
`realism.html` (the same with pictures), `mixed.html` (fifty lesions without labels) and `mixed.txt` (the answers).
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from synthlong.errors import InputWarning
from synthlong.manifest import read_cases

from .material import Fold, Patch, read_fold, real_lesions, synthetic_lesions
from .page import page_of, quiz_of
from .painting import PAINTERS, beside_fluid, distances, measure_repainting, places, real_places, repainted_lesions
from .removal import measure_removal
from .twosample import CLASSIFIERS, telling_features, two_sample

_METHODS = ("mean fill", "final fill", "biharmonic", "local mean", "truth, smoothed")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.realism", description=__doc__.split("\n")[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path, nargs="*", default=[None], help="a folder for each fold")
    parser.add_argument("--quick", action="store_true", help="fewer patches, no CNN")
    parser.add_argument("--masks", type=Path, help="folder of MNI-space masks, to compare places and sizes with")
    options = parser.parse_args()
    warnings.simplefilter("ignore", InputWarning)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    cases = list(read_cases(options.manifest))
    folds = [read_fold(w, cases) for w in options.weights]
    lines = [f"fold {n}: {_about(f)}" for n, f in enumerate(folds)]

    def say(line: str = "") -> None:
        lines.append(line)
        print(line, flush=True)

    print("\n".join(lines))
    rows, tissue, filled = [], [], []
    for fold in folds:
        found, patches = measure_removal(fold, rounds=1 if options.quick else 2)
        rows += found
        tissue += [a for a, _ in patches]
        filled += [b for _, b in patches]
    for line in removal_table(rows):
        say(line)

    real = [p for f in folds for c in f.cases for _, p in real_lesions(c)]
    made = {"repainted": [p for f in folds for p in repainted_lesions(f)]}
    for painter in PAINTERS:
        made[painter] = [p for f in folds for p in _synthetic(f, painter, 60 if options.quick else 100)]
    say("\nPainting: real lesions removed and painted again by their own profile")
    for line in repainting_table([r for f in folds for r in measure_repainting(f)]):
        say(line)
    say("\nKS distance to the real lesions of the same patient")
    say(f"{'':24s} contrast   edge  texture")
    for name, patches in made.items():
        apart = distances(real, patches)
        say(f"{name:24s} {apart['contrast']:8.2f} {apart['edge']:6.2f} {apart['texture']:8.2f}")
    crowded = [p for f in folds for c in f.cases for _, p in real_lesions(c, alone=False)]
    compared = {"real that lie alone": real, "all real": crowded, "network": made["network"]}
    shares = ", ".join(f"{name} {beside_fluid(patches):.2f}" for name, patches in compared.items())
    say("\nShare of lesions that lie beside fluid: " + shares)
    if options.masks:
        lesions = real_places(sorted(options.masks.rglob("*MNI152*lesions_mask.nii.gz")))
        apart = _place_distances(lesions, places(tuple(c for f in folds for c in f.cases), 10 if options.quick else 40))
        say("\nPlaces and sizes of the default options against all masks, KS: " + apart)

    say("\nTwo-sample test: AUC [95 %], 0.5 = cannot be told apart; classifiers saw other patients only")
    names = [c for c in CLASSIFIERS if not (options.quick and c == "CNN")]
    say(f"{'':24s}     n " + " ".join(f"{n:>18s}" for n in names))
    pairs = {"tissue, inpainted": (tissue, filled)} | {name: (real, patches) for name, patches in made.items()}
    for name, (one, other) in pairs.items():
        verdicts = [two_sample(one, other, c) for c in names]
        cells = [f"{v.auc:.2f} [{v.interval[0]:.2f}, {v.interval[1]:.2f}]" for v in verdicts]
        say(f"{name:24s} {len(one):3d}/{len(other):3d}" + " ".join(f"{c:>18s}" for c in cells))
        for patient in verdicts[0].patients:
            say(f"    in {patient:25s}" + " ".join(f"{v.patients[patient]:<18.2f}" for v in verdicts).rstrip())
        say("    told by " + ", ".join(f"{n} {a:.2f}" for n, a in telling_features(one, other)))
    say(f"\n{time.monotonic() - started:.0f} s")

    (options.out / "realism.txt").write_text("\n".join(lines) + "\n")
    groups = {"real": real, **made, "tissue": tissue, "tissue, inpainted": filled}
    (options.out / "realism.html").write_text(page_of("Realism", "\n".join(lines), groups))
    mixed, answers = quiz_of(real, made["network"])
    (options.out / "mixed.html").write_text(mixed)
    (options.out / "mixed.txt").write_text("\n".join(f"{n} {a}" for n, a in enumerate(answers, start=1)) + "\n")


def _about(fold: Fold) -> str:
    measured = sorted({c.id for c in fold.cases})
    unseen = not {c.split("_")[0] for c in measured} & set(fold.trained_on)
    how = "measured on" if unseen else "SEEN IN TRAINING, measured on"
    return f"trained on {', '.join(fold.trained_on)}; {how} {', '.join(measured)}"


def _synthetic(fold: Fold, painter: str, count: int) -> Iterable[Patch]:
    """Return about `count` lesions of each patient."""
    patients = [c.id.split("_")[0] for c in fold.cases]
    for case, patient in zip(fold.cases, patients, strict=True):
        yield from synthetic_lesions(fold, case, painter, count // patients.count(patient))


def removal_table(rows: list[dict]) -> list[str]:
    """Return the table of removal: errors in the hole, texture and seam as ratios to the original's."""
    lines = ["\nRemoval: lesion-free tissue, lesion-shaped holes (brain mode = 1)"]
    for region in ("all", "white matter"):
        kept = [r for r in rows if region == "all" or r["white"]]
        count = sum(r["method"] == "mean fill" for r in kept)
        head = "   MAE   PSNR   SSIM  texture  lag 1-3 (original)               seam"
        lines.append(f"{f'{region}, {count} holes':24s}{head}")
        for method in _METHODS:
            own = [r for r in kept if r["method"] == method]
            if not own:
                continue

            def mean(key: str, own: list[dict] = own) -> float:
                return float(np.nanmean([r[key] for r in own]))

            texture = np.sqrt(mean("power fill") / mean("power truth"))
            lags = " ".join(f"{mean(f'lag {n} fill'):.2f}" for n in (1, 2, 3))
            truth = " ".join(f"{mean(f'lag {n} truth'):.2f}" for n in (1, 2, 3))
            errors = f"{mean('mae'):6.4f} {-10 * np.log10(mean('mse')):6.2f} {mean('ssim'):6.3f}"
            seam = mean("seam fill") / mean("seam truth")
            lines.append(f"  {method:22s} {errors} {texture:8.2f}  {lags} ({truth})  {seam:6.2f}")
    return lines


def repainting_table(rows: list[dict[str, float]]) -> list[str]:
    """Return the table of repainting."""
    if not rows:
        return ["no lesion lies alone"]
    table = {k: np.array([r[k] for r in rows]) for k in rows[0]}
    lines = [f"{len(rows)} lesions, MAE in the hole {table['mae'].mean():.3f}"]
    for name in ("contrast", "edge", "texture"):
        real, again = table[f"real {name}"], table[f"again {name}"]
        lines.append(
            f"  {name:10s} real {real.mean():.3f} (SD {real.std():.3f}), again {again.mean():.3f} ({again.std():.3f})"
        )
    return lines


def _place_distances(real: np.ndarray, made: np.ndarray) -> str:
    from scipy.stats import ks_2samp

    if not len(real) or not len(made):
        return "no lesions"
    apart = [float(ks_2samp(real[:, n], made[:, n]).statistic) for n in range(4)]
    return ", ".join(f"{n} {a:.2f}" for n, a in zip(("|x|", "y", "z", "volume"), apart, strict=True))


if __name__ == "__main__":
    main()
