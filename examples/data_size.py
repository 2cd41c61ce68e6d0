"""How many real patients it takes: Figure 6 of Kamraoui et al. (2022), on any manifest of real pairs.

    python examples/data_size.py PAIRS.csv CASES -o size [--test TEST.csv] [--patients 34 26 17 8 0] [--seeds 1] ...

The method with all its parts, and the baseline that knows real pairs only, trained on n patients (0: synthetic pairs
only, which the baseline cannot) and scored on whole scans of TEST.csv, or of the patients of the first of `--folds`.
See `ablation.py`.
"""

from __future__ import annotations

import numpy as np
from ablation import BASELINE, FULL, parser, scale_of, score, show, splits


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--patients", type=int, nargs="+", default=[34, 26, 17, 8, 0])
    options = asked.parse_args()
    name, training, held_out = next(splits(options))
    subjects = list(dict.fromkeys(pair.subject for pair in training))
    if max(options.patients) > len(subjects):
        asked.error(f"--patients {max(options.patients)}: there are {len(subjects)} to train on")
    rows = {}
    for method in (BASELINE, FULL):
        for count in options.patients:
            if not count and not method.synthetic:
                continue
            seeds = []
            for seed in range(options.seeds):
                chosen = set(np.random.default_rng(seed).permutation(subjects)[:count])
                some = [pair for pair in training if pair.subject in chosen]
                called = name if len(some) == len(training) else f"{count}patients"  # the ablation has these, too
                weights = scale_of(options, seed).train(method, some, called)
                seeds.append([score(weights, pair) for pair in held_out])
            rows[f"{method.name}, n = {count}"] = np.array(seeds)
    show(rows)


if __name__ == "__main__":
    main()
