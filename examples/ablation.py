"""What each part of the training adds: Table 2 of Kamraoui et al. (2022), on any manifest of real pairs.

    python examples/ablation.py PAIRS.csv CASES -o ablation [--test TEST.csv | --folds 5] [--seeds 1] [--steps 2000] ...

PAIRS.csv has columns `subject,baseline,followup,mask` (`synthlong prepare` writes it), CASES are single visits with
lesion masks. Five ways to train on the real pairs, each scored on whole scans: those of TEST.csv, as in the paper, or
of the patients of each fold in turn.

(a) from nothing, with orthogonal turns and mirroring; (b) and with the encoder of stage one; (c) (a) after pretraining
on synthetic pairs; (d) (a) with artifacts; (e) all of it. Synthetic pairs are made on the fly; or they were made before
(`--synthetic`), with `artifacts = "none"` for (c) and `"kamraoui"` for (e).

Every training has the same number of steps. Patients held out choose no weights: those of the last step are scored.
What was trained with the same options is found again in the folder. CASES must not hold patients
of PAIRS.csv or TEST.csv: the first stages learn from all of them.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import sem, wilcoxon

from synthlong.case import Case
from synthlong.dataset.shards import subjects_of
from synthlong.detection.inference import detect, read_detectors
from synthlong.detection.networks import SegmentationUNet, SiameseUNet
from synthlong.detection.scores import lesion_scores
from synthlong.detection.visits import read_pair
from synthlong.manifest import manifest_rows
from synthlong.synthesis import SynthesisConfig
from synthlong.training.patches import PAIR
from synthlong.training.stage_config import FinetuneConfig, PretrainConfig, SegmentConfig
from synthlong.training.stages import finetune, pretrain, segment
from synthlong.weights import read_weights, write_weights

COLUMNS = ("Dice", "LesF1", "PPV", "TPR", "Avg. Score")


@dataclass(frozen=True)
class Method:
    """One way to train."""

    name: str
    transfer: bool = False
    synthetic: bool = False
    artifacts: bool = False

    @property
    def preset(self) -> Literal["kamraoui", "none"]:
        """Its artifacts."""
        return "kamraoui" if self.artifacts else "none"

    @property
    def trainable(self) -> str:
        """What is not frozen."""
        return "decoder" if self.transfer else "all"


BASELINE = Method("a real pairs only")
FULL = Method("e all", transfer=True, synthetic=True, artifacts=True)
METHODS = (
    BASELINE,
    Method("b + stage one", transfer=True),
    Method("c + synthetic pairs", synthetic=True),
    Method("d + artifacts", artifacts=True),
    FULL,
)


@dataclass(frozen=True)
class Pair:
    """Files of two visits of a patient."""

    subject: str
    baseline: Path
    followup: Path
    mask: Path


@dataclass(frozen=True)
class Scale:
    """How large and how long, the same for all."""

    cases: Path
    synthetic: Path | None
    out: Path
    steps: int
    side: int
    batch: int
    widths: tuple[int, ...]
    learning_rate: float
    seed: int

    def shared(self) -> dict[str, Any]:
        """Return what all stages have in common."""
        plain = {"steps": self.steps, "side": self.side, "batch": self.batch, "seed": self.seed, "folds": 1}
        return {**plain, "learning_rate": self.learning_rate, "schedule": "cosine", "report_every": self.steps}

    @cache  # noqa: B019
    def begin(self, method: Method) -> Path:
        """Return the weights that a method has before it sees a real pair."""
        parts = [name for name in ("transfer", "synthetic", "artifacts") if getattr(method, name)]
        out = self.out / f"begin-{'-'.join(parts) or 'random'}-seed{self.seed}.safetensors"
        encoder = out.with_name(out.name.replace("begin", "encoder"))
        if method.transfer:
            options = {**self.shared(), "widths": self.widths, "artifacts": method.preset}
            segment(self.cases, encoder, config=SegmentConfig.from_dict(options), card={}, tensorboard=False)
        else:
            torch.manual_seed(self.seed)
            network = SegmentationUNet(SegmentConfig(widths=self.widths).network)
            write_weights(encoder, network, task=network.task, card={})
        if method.synthetic:
            options = {**self.shared(), "trainable": method.trainable}
            if self.synthetic is None:
                options["synthesis"] = SynthesisConfig(artifacts=method.preset)
            config = PretrainConfig(**options)
            source = self.synthetic / method.preset if self.synthetic else self.cases
            pretrain(source, out, encoder=encoder, config=config, card={}, tensorboard=False)
        else:
            torch.manual_seed(self.seed)
            trained, _ = read_weights(encoder, task=SegmentationUNet.task)
            assert isinstance(trained, SegmentationUNet)
            write_weights(out, SiameseUNet.from_segmentation(trained), task=SiameseUNet.task, card={})
        return out

    def train(self, method: Method, pairs: Sequence[Pair], name: str) -> Path:
        """Return the weights that a method has after these pairs; without any, those before."""
        begin = self.begin(method)
        if not pairs:
            return begin
        listing = self.out / f"{name}.csv"
        write_pairs(listing, pairs)
        options = {**self.shared(), "trainable": method.trainable, "artifacts": method.preset}
        out = self.out / f"{method.name[0]}-{name}-seed{self.seed}.safetensors"
        config = FinetuneConfig.from_dict(options)
        finetune(listing, out, weights=begin, config=config, card={}, tensorboard=False)
        return out


def read_pairs(manifest: Path) -> list[Pair]:
    rows = manifest_rows(manifest, needed=PAIR, optional=())
    return [Pair(subject, **paths) for subject, _, paths in rows]


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["subject", "baseline", "followup", "mask"])
        table.writerows([p.subject, p.baseline.resolve(), p.followup.resolve(), p.mask.resolve()] for p in pairs)


def splits(options: argparse.Namespace) -> Iterator[tuple[str, list[Pair], list[Pair]]]:
    """Yield a name, the pairs to train on, and those to score: of the test, or of each fold in turn."""
    pairs = read_pairs(options.pairs)
    if options.test:
        yield "all", pairs, read_pairs(options.test)
        return
    subjects = sorted({p.subject for p in pairs})
    for fold in range(options.folds):
        held_out = subjects_of("validation", subjects, fold=fold, folds=options.folds)
        training = [p for p in pairs if p.subject not in held_out]
        yield f"fold{fold}", training, [p for p in pairs if p.subject in held_out]


@cache
def visits_of(pair: Pair) -> tuple[Case, Case]:
    """Return what is scored again and again."""
    return read_pair(pair.baseline, pair.followup, pair.mask, subject=pair.subject)


def score(weights: Path, pair: Pair) -> NDArray[np.float64]:
    """Return a patient's row of the table."""
    baseline, followup = visits_of(pair)
    found = detect(baseline, followup, read_detectors([weights]), mirrored=False)  # half the time
    scores = lesion_scores(followup.lesions, found.mask, (1.0, 1.0, 1.0))
    if scores.dice is None or scores.lesion_f1 is None:
        return np.full(len(COLUMNS), np.nan)  # no true lesion: these scores are not defined
    both = (scores.dice + scores.lesion_f1) / 2
    return np.array([scores.dice, scores.lesion_f1, scores.ppv, scores.sensitivity, both], float)


def show(rows: dict[str, NDArray[np.float64]]) -> None:
    """Print means over seeds and patients, standard errors over patients, and p of each against the first.

    Args:
        rows: By method, `(seeds, patients, columns)`.
    """
    print(f"{'':26}" + "".join(f"{name:>24}" for name in COLUMNS))
    baseline = np.nanmean(next(iter(rows.values())), axis=0)
    for name, values in rows.items():
        patients = np.nanmean(values, axis=0)
        errors = sem(patients, nan_policy="omit")
        cells = []
        for n, (mean, error) in enumerate(zip(np.nanmean(patients, axis=0), errors, strict=True)):
            known = ~np.isnan(patients[:, n] + baseline[:, n])
            change = (patients - baseline)[known, n]
            p = f" p {wilcoxon(change).pvalue:.2f}" if change.any() else ""
            cells.append(f"{mean:.3f}+-{error:.3f}{p}")
        print(f"{name:26}" + "".join(f"{cell:>24}" for cell in cells))
        if len(values) > 1:
            spread = np.nanstd(np.nanmean(values, axis=1), axis=0, ddof=1)
            print(f"{'  SD over seeds':26}" + "".join(f"{sd:>24.3f}" for sd in spread))


def parser(text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("cases", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--test", type=Path, help="pairs to score; default: each fold of PAIRS in turn")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--synthetic", type=Path, help="runs of `generate`, none/ and kamraoui/; default: on the fly")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def scale_of(options: argparse.Namespace, seed: int) -> Scale:
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    same = ("cases", "synthetic", "out", "steps", "side", "batch", "learning_rate")
    return Scale(**{name: getattr(options, name) for name in same}, widths=tuple(options.widths), seed=seed)


def main() -> None:
    options = parser(__doc__).parse_args()
    parts = list(splits(options))
    rows = {}
    for method in METHODS:
        seeds = []
        for seed in range(options.seeds):
            scores: list[NDArray[np.float64]] = []
            for name, training, held_out in parts:
                weights = scale_of(options, seed).train(method, training, name)
                scores += [score(weights, pair) for pair in held_out]
            seeds.append(scores)
        rows[method.name] = np.array(seeds)
    show(rows)


if __name__ == "__main__":
    main()
