"""Hard example mining beside oversampling: the six settings of Schmidt-Mengin et al. (2022), Figure 2, made small.

    synthlong generate training.csv -o pairs --pairs 4000 --seed 1
    python benchmarks/mining.py pairs -o mining [--seeds 3] [--steps 2000] [--side 16] [--widths 8 16 32] ...

Each training is one call of `train_ohem`, kept in the folder and not made again, so the benchmark goes on where it was
stopped. Trainings without mining get 64/30 as many steps, as the paper's had in the same time. Draws the validation
Dice of every setting, mean and standard error over the seeds, into `mining/curves.png`, and prints a table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthlong.training.ohem import OhemConfig, train_ohem

SETTINGS: dict[str, dict[str, Any]] = {
    "mining, momentum 0": {"momentum": 0.0},
    "mining, momentum 0.9": {"momentum": 0.9},
    "mining, momentum 0.99": {"momentum": 0.99},
    "no mining, p = 0": {"mining": False, "positive_share": 0.0},
    "no mining, p = 0.1": {"mining": False, "positive_share": 0.1},
    "no mining, p = 0.5": {"mining": False, "positive_share": 0.5},
}
_WITHOUT_MINING = 64 / 30
_POINTS = 20


def train(source: Path, out: Path, setting: dict[str, Any], seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a training with one setting; what was done before is found again."""
    steps = round(options.steps * (1 if setting.get("mining", True) else _WITHOUT_MINING))
    every = max(steps // _POINTS, 1)
    scale = {"side": options.side, "widths": tuple(options.widths), "folds": options.folds, "fold": options.fold}
    scale |= {"candidates": options.candidates, "batch": options.batch, "validation_patches": 256}
    config = OhemConfig(**scale, **setting, steps=steps, seed=seed, report_every=every, checkpoint_every=every)
    return train_ohem(source, out, config=config, card={}, tensorboard=False)


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the mean curve of each setting and the standard error of its mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for number, (name, cards) in enumerate(curves.items()):
        dice = np.array([[point["dice"] for point in card["curve"]] for card in cards])
        share = np.array([point["step"] for point in cards[0]["curve"]]) / cards[0]["train"]["steps"]
        mean, sem = dice.mean(axis=0), dice.std(axis=0, ddof=1) / np.sqrt(len(dice)) if len(dice) > 1 else 0
        style = "-" if cards[0]["train"]["mining"] else "--"
        axes.plot(share, mean, style, color=f"C{number}", label=name)
        axes.fill_between(share, mean - sem, mean + sem, color=f"C{number}", alpha=0.15, linewidth=0)
    axes.set(xlabel="share of the training", ylabel="Dice on patches of patients held out", xlim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000, help="with mining")
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    for seed in range(options.seeds):  # all settings of a seed before the next: a stopped run can be compared
        for number, (name, setting) in enumerate(SETTINGS.items()):
            out = options.out / f"{number}-seed{seed}.safetensors"
            curves[name].append(train(options.source, out, setting, seed, options))
        draw(curves, options.out / "curves.png")
    print(f"{'setting':24} {'best Dice':>26} {'last Dice':>26} {'ms/step':>8}")
    for name, cards in curves.items():
        figures = [[card["best"]["dice"] for card in cards], [card["curve"][-1]["dice"] for card in cards]]
        said = [f"{np.mean(f):.3f} ({', '.join(f'{d:.2f}' for d in f)})" for f in figures]
        pace = np.median([1000 * card["seconds"] / card["train"]["steps"] for card in cards])
        print(f"{name:24} {said[0]:>26} {said[1]:>26} {pace:8.0f}")


if __name__ == "__main__":
    main()
