"""The two-sample test: can a classifier, trained on other patients, tell the real from the made?

Chance gives an AUC of 0.5. Each patient is scored by classifiers that saw none of its scans; the AUC is taken
within the patient and averaged over patients by their number of real patches. Interval: 2.5 to 97.5 % of
resampled patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from .material import SIDE, Patch
from .measures import FEATURES, features

__all__ = ["CLASSIFIERS", "Verdict", "telling_features", "two_sample"]

_RESAMPLED = 500
_CROP = 24
Scores = Callable[[list[Patch], NDArray, list[Patch]], NDArray]


@dataclass(frozen=True)
class Verdict:
    """What a classifier reaches.

    Args:
        auc: Averaged over patients; not a number with fewer than two.
        interval: 2.5 and 97.5 %.
        patients: AUC within each.
    """

    auc: float = np.nan
    interval: tuple[float, float] = (np.nan, np.nan)
    patients: dict[str, float] = field(default_factory=dict)


def two_sample(real: list[Patch], made: list[Patch], classifier: str) -> Verdict:
    """Return how well a classifier that saw other patients tells the real from the made."""
    if not real or not made:
        return Verdict()
    patches, truth = real + made, np.repeat([0, 1], [len(real), len(made)])
    owners = np.array([p.patient for p in patches])
    scored, names = [], []
    for patient in sorted(set(owners)):
        test, train = np.flatnonzero(owners == patient), np.flatnonzero(owners != patient)
        if len(set(truth[test])) == len(set(truth[train])) == 2:
            scores = CLASSIFIERS[classifier]([patches[n] for n in train], truth[train], [patches[n] for n in test])
            scored.append((truth[test], scores))
            names.append(patient)
    if not scored:
        return Verdict()
    rng = np.random.default_rng(0)
    drawn = [_averaged([_resampled(rng, *s) for s in scored]) for _ in range(_RESAMPLED)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    each = {name: float(roc_auc_score(*s)) for name, s in zip(names, scored, strict=True)}
    return Verdict(_averaged(scored), (float(low), float(high)), each)


def _averaged(scored: list[tuple[NDArray, NDArray]]) -> float:
    counts = [(t == 0).sum() for t, _ in scored]
    return float(np.average([roc_auc_score(*s) for s in scored], weights=counts))


def _resampled(rng: np.random.Generator, truth: NDArray, scores: NDArray) -> tuple[NDArray, NDArray]:
    drawn = np.concatenate([rng.choice(np.flatnonzero(truth == kind), (truth == kind).sum()) for kind in (0, 1)])
    return truth[drawn], scores[drawn]


def _table(patches: list[Patch]) -> NDArray[np.float64]:
    return np.stack([features(p) for p in patches])


def _balanced(truth: NDArray) -> NDArray[np.float64]:
    return np.where(truth == 1, 0.5 / truth.mean(), 0.5 / (1 - truth.mean()))


def _logistic(train: list[Patch], truth: NDArray, test: list[Patch]) -> NDArray:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=2000, class_weight="balanced"))
    return model.fit(_table(train), truth).decision_function(_table(test))


def _boosting(train: list[Patch], truth: NDArray, test: list[Patch]) -> NDArray:
    model = HistGradientBoostingClassifier(
        max_iter=150, learning_rate=0.06, max_leaf_nodes=8, min_samples_leaf=10, l2_regularization=1.0, random_state=0
    )
    return model.fit(_table(train), truth, sample_weight=_balanced(truth)).decision_function(_table(test))


def _network(train: list[Patch], truth: NDArray, test: list[Patch]) -> NDArray:
    """Train a small 3-D CNN on image and mask, cubes of 24 voxels, turned at random."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        *(nn.Conv3d(2, 8, 3, padding=1, stride=2), nn.BatchNorm3d(8), nn.ReLU()),
        *(nn.Conv3d(8, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d(2)),
        *(nn.Conv3d(16, 32, 3, padding=1), nn.BatchNorm3d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(32, 1)),
    )
    x, y, steps = _cubes(train), torch.from_numpy(truth).float(), 250
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    rates = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, steps)
    groups = [np.flatnonzero(truth == kind) for kind in (0, 1)]
    for _ in range(steps):
        chosen = np.concatenate([rng.choice(g, 16) for g in groups])
        batch = torch.stack([_turned(x[int(n)], rng) for n in chosen])
        loss = nn.functional.binary_cross_entropy_with_logits(model(batch)[:, 0], y[chosen])
        adam.zero_grad()
        loss.backward()
        adam.step()
        rates.step()
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(part)[:, 0] for part in _cubes(test).split(64)]).numpy()


def _cubes(patches: list[Patch]) -> torch.Tensor:
    a = (SIDE - _CROP) // 2
    inner = (slice(a, a + _CROP),) * 3
    return torch.from_numpy(
        np.stack([np.stack([p.image[inner] - 1, p.mask[inner]]) for p in patches]).astype(np.float32)
    )


def _turned(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    order = [1 + int(a) for a in rng.permutation(3)]
    return x.permute(0, *order).flip([a for a in (1, 2, 3) if rng.random() < 0.5])


CLASSIFIERS: dict[str, Scores] = {"logistic": _logistic, "boosting": _boosting, "CNN": _network}


def telling_features(real: list[Patch], made: list[Patch], most: int = 5) -> list[tuple[str, float]]:
    """Return the features that tell the two apart best, each with its AUC alone, within patients."""
    patches, truth = real + made, np.repeat([0, 1], [len(real), len(made)])
    if not patches:
        return []
    owners, table = np.array([p.patient for p in patches]), _table(patches)
    found = []
    for n, name in enumerate(FEATURES):
        groups = [(truth[owners == p], table[owners == p, n]) for p in sorted(set(owners))]
        both = [g for g in groups if len(set(g[0])) == 2]
        if both:
            found.append((name, _averaged(both)))
    return sorted(found, key=lambda f: -abs(f[1] - 0.5))[:most]
