import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from synthlong import derived, pair
from synthlong.dataset import making
from synthlong.dataset.store import open_case, store_case, stored_stamp
from synthlong.pair import render
from synthlong.recipe import draw_recipe, rng_of
from synthlong.synthesis import SynthesisConfig

CONFIG = SynthesisConfig(box=24, with_new_lesions=1.0, new_mean=4.0, protocol_spread=0.2)


class Bright:
    """A painter without a network."""

    def paint(self, x, mask, *, seed, profile, donor=None):
        return np.where(mask, 1.5, x).astype(np.float32)


@pytest.fixture
def stored(small_case, tmp_path):
    store_case(tmp_path / "case-small", small_case, CONFIG, stamp={"seed": 1})
    return tmp_path / "case-small"


def test_a_stored_case_gives_the_same_pairs_without_working_anything_out(small_case, stored, monkeypatch):
    wanted = []
    for k in range(5):
        drawn = draw_recipe(small_case, CONFIG, rng_of(0, small_case.id, k))
        wanted.append((drawn, render(small_case, drawn, painter=Bright())))

    def forbidden(*_, **__):
        raise AssertionError("worked out again")

    for module, name in ((derived, "find_lesions"), (derived, "find_placements"), (derived, "box_of")):
        monkeypatch.setattr(module, name, forbidden)
    case = open_case(stored, CONFIG)
    for k, (drawn, made) in enumerate(wanted):
        again = draw_recipe(case, CONFIG, rng_of(0, case.id, k))
        assert again == drawn
        other = render(case, again, painter=Bright())
        for name in ("baseline", "followup", "new_lesions", "evolution", "lesions_baseline", "lesions_followup"):
            assert np.array_equal(getattr(other, name), getattr(made, name)), name
    assert pair.NEW in {code for _, made in wanted for code in np.unique(made.evolution)}


def test_stamp_tells_what_a_stored_case_depends_on(stored, tmp_path, small_case):
    assert stored_stamp(stored) == {"seed": 1}
    assert stored_stamp(tmp_path / "none") is None
    store_case(stored, small_case, CONFIG, stamp={"seed": 2})
    assert stored_stamp(stored) == {"seed": 2}
    before = stored.stat().st_ino
    store_case(stored, small_case, CONFIG, stamp={"seed": 2})
    assert stored.stat().st_ino == before, "a case that has readers was replaced by its like"
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_case_that_two_processes_store_is_whole(tmp_path, small_case):
    """A cluster may do a task twice: neither ever shows the other's half of it."""
    work = [(tmp_path / "case", small_case, seed) for seed in (1, 1, 1, 1)]
    with ThreadPoolExecutor(4) as threads:
        for _ in threads.map(lambda w: store_case(w[0], w[1], CONFIG, stamp={"seed": w[2]}), work):
            assert stored_stamp(tmp_path / "case") == {"seed": 1}
            assert np.array_equal(open_case(tmp_path / "case", CONFIG).flair, small_case.flair)
    assert [p.name for p in tmp_path.iterdir()] == ["case"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_many_cases_take_few_descriptors(stored, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for n in range(60):
        folder = tmp_path / f"case-{n}"
        shutil.copytree(stored, folder)
        assert making._opened(folder, CONFIG).id == "small"
    assert len(os.listdir("/proc/self/fd")) - before < 256
    making._opened.cache_clear()
    assert len(os.listdir("/proc/self/fd")) <= before
