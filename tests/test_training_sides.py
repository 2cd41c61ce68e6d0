"""Who is learned from and who is held out, what is drawn at each step, and by what a source is known."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import write_balls, write_scans

from synthlong.training.ohem import OhemConfig
from synthlong.training.sides import drawn_from, read_sides, rng_at, source_sha256

pytestmark = pytest.mark.filterwarnings("ignore::synthlong.errors.InputWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_balls(tmp_path_factory.mktemp("balls"))


def test_each_seed_step_and_process_draws_its_own() -> None:
    keys = [(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)]
    assert len({rng_at(*key).random() for key in keys}) == len(keys)
    assert rng_at(1, 2, 3).random() == rng_at(1, 2, 3).random()


@pytest.mark.parametrize("fold", [0, 1])
def test_who_is_held_out_is_not_learned_from(run: Path, fold: int) -> None:
    training, held_out, about = read_sides(run, OhemConfig(side=8, folds=2, fold=fold))
    assert held_out is not None
    assert sorted(training.subjects + held_out.subjects) == [f"sub-{k}" for k in range(4)]
    assert (about["patients"], about["held_out"]) == (training.subjects, held_out.subjects)


def test_with_one_fold_nobody_is_held_out(run: Path) -> None:
    training, held_out, about = read_sides(run, OhemConfig(side=8, folds=1))
    assert held_out is None
    assert (training.subjects, about["held_out"]) == ([f"sub-{k}" for k in range(4)], [])


def test_a_margin_is_that_of_the_patches_to_learn_from(manifest: Path, tmp_path: Path) -> None:
    training, held_out, _ = read_sides(write_scans(tmp_path, manifest), OhemConfig(side=16, folds=2), margin=4)
    assert held_out is not None
    rng = np.random.default_rng(0)
    assert training.draw(rng, 1, 1)[0].shape[2:] == (24, 24, 24)
    assert held_out.draw(rng, 1, 1)[0].shape[2:] == (16, 16, 16)


def test_those_held_out_are_measured_on_the_same_patches_each_time() -> None:
    class Asked:
        def draw(self, rng: np.random.Generator, count: int, positive: int) -> Any:
            return rng.random(), count, positive

    def drawn(seed: int) -> Any:
        return drawn_from(Asked(), OhemConfig(seed=seed, validation_patches=200), 0.3)

    assert drawn(0) == drawn(0)
    assert drawn(0)[0] != drawn(1)[0]
    assert drawn(0)[1:] == (200, 60)
    assert drawn_from(None, OhemConfig(), 0.3) is None


def test_a_source_is_known_by_the_bytes_of_its_files(run: Path, manifest: Path, tmp_path: Path) -> None:
    assert source_sha256(run, pairs=True) == hashlib.sha256((run / "index.json").read_bytes()).hexdigest()
    cases = shutil.copytree(manifest.parent, tmp_path / "cases") / manifest.name
    (tmp_path / "pairs").mkdir()
    pairs = write_scans(tmp_path / "pairs", cases)
    before = [source_sha256(cases, pairs=False), source_sha256(pairs, pairs=True)]
    assert before[0] == source_sha256(manifest, pairs=False)  # wherever they lie
    for path in (cases.parent / "cs07_mask.nii.gz", tmp_path / "pairs" / "b_new.nii.gz"):
        path.write_bytes(path.read_bytes() + b"\0")
    after = [source_sha256(cases, pairs=False), source_sha256(pairs, pairs=True)]
    assert not set(before) & set(after)
