import copy
import gc
import gzip
import json
import os
import pickle
import shutil
import signal
import tracemalloc
import warnings
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader

from synthlong import PairStream, Recipe, ShardDataset
from synthlong.bank import LesionBank
from synthlong.dataset.run import generate
from synthlong.errors import ConfigError, InputError, InputWarning, OutputError, SynthlongError
from synthlong.inpainting import Inpainter, heal
from synthlong.synthesis import SynthesisConfig

CONFIG = SynthesisConfig(box=32, new_mean=4.0)
PLAIN = SynthesisConfig(
    box=16, new_mean=1.0, stable_mean=0.0, with_new_lesions=1.0, painter="ellipsoid", artifacts="none"
)
VOLUMES = ("baseline", "followup", "new_lesions", "evolution", "lesions_baseline", "lesions_followup")

pytestmark = [
    pytest.mark.filterwarnings("ignore::synthlong.errors.InputWarning"),
    pytest.mark.xdist_group("stream"),
]


def draw(sample):
    """A transform that draws from torch's global generator, and tells of the threads that it runs in."""
    return {"recipe": sample["recipe"], "drawn": torch.rand(2), "threads": torch.get_num_threads()}


def shown(batches):
    return [batch["recipe"] for batch in batches]


@pytest.fixture(scope="module")
def run(manifest):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        generate(manifest, manifest.parent / "of-stream", workers=1, pairs=4, seed=3, config=CONFIG)
    return manifest.parent / "of-stream"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def stream(small_case, work):
    """`stream(pairs=..., ...)` of two small cases, prepared once."""

    def make(**options):
        cases = [replace(small_case, id=name) for name in ("b", "a")]
        return PairStream(cases, PLAIN, **({"seed": 1, "work": work} | options))

    return make


def test_epoch_0_is_what_generate_writes(run, manifest, work):
    written = ShardDataset(run, transform=dict, seed=3)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        made = list(PairStream(manifest, CONFIG, 3, pairs=4, work=work))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(made) == 4
    for k, sample in enumerate(made):
        assert list(sample) == list(written[k])
        assert sample["recipe"] == written[k]["recipe"]
        for name in VOLUMES:
            assert sample[name].dtype == written[k][name].dtype
            assert torch.equal(sample[name], written[k][name]), (k, name)
    assert any(sample["new_lesions"].any() for sample in made)


def test_cases_are_healed_unless_they_are(small_case, work):
    bare = replace(small_case, healthy=None)
    healed = heal(bare, Inpainter.read(precision="float32"))
    config = replace(PLAIN, precision="float32")
    first, second = (list(PairStream([c], config, pairs=3, keys=["baseline"], work=work)) for c in (bare, healed))
    assert all(torch.equal(a["baseline"], b["baseline"]) for a, b in zip(first, second, strict=True))
    assert bare.healthy is None


def test_workers_change_neither_batches_nor_their_order(stream):
    made = stream(pairs=7, batch_size=2)
    alone = made.loader()
    twice = [*alone, *alone]  # the second pass is the next epoch
    assert [len(batch["recipe"]) for batch in twice] == [2, 2, 2, 1] * 2
    assert twice[0]["baseline"].shape == (2, 1, 16, 16, 16)
    assert len({text for texts in shown(twice) for text in texts}) == 14
    assert len(made) == 7
    assert len(alone) == 4

    again = stream(pairs=14, batch_size=14).loader()  # one long epoch: pair k of epoch e is its pair 7 e + k
    assert [text for texts in shown(twice) for text in texts] == shown(again)[0]

    for workers in (1, 2):
        loader = made.loader(num_workers=workers, persistent_workers=True, multiprocessing_context="fork")
        made.set_epoch(0)
        for batch, other in zip(twice, [*loader, *loader], strict=True):
            assert batch["recipe"] == other["recipe"]
            assert all(torch.equal(batch[name], other[name]) for name in VOLUMES)


def test_a_plain_loader_repeats_an_epoch_until_told(stream):
    made = stream(pairs=5, batch_size=2)
    alone = made.loader()
    epochs = [shown(alone), shown(alone)]
    for workers, options in ((0, {}), (2, {"persistent_workers": True, "multiprocessing_context": "fork"})):
        made.set_epoch(0)
        loader = DataLoader(made, batch_size=2, num_workers=workers, **options)
        assert len(loader) == 3
        assert shown(loader) == shown(loader) == epochs[0]
        made.set_epoch(1)
        assert shown(loader) == epochs[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_workers_of_a_copy_see_its_epochs(stream, copied):
    made = stream(pairs=2)
    loader = made.loader()
    wanted = [*shown(loader), *shown(loader)]
    options = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    loader = copied(made).loader(**options)
    loader.dataset.set_epoch(0)
    assert [*shown(loader), *shown(loader)] == wanted


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_a_plain_pass_is_whole_after_a_loader_that_was_resumed(stream, method, workers):
    made = stream(pairs=5)
    loader = made.loader(num_workers=workers, persistent_workers=True, multiprocessing_context=method)
    plain = DataLoader(made, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    wanted = shown(made.loader())
    for _ in range(2):  # the second time, all workers are there
        loader.load_state_dict(loader.state_dict() | {"epoch": 0, "batches": 2})
        at = iter(loader)
        seen = [next(at)["recipe"]]
        assert [[sample["recipe"]] for sample in made] == shown(DataLoader(made)) == shown(plain) == wanted
        assert seen + shown(at) == wanted[2:]
        assert [[sample["recipe"]] for sample in made] == shown(plain) == wanted
    loader.load_state_dict(loader.state_dict() | {"epoch": 1, "batches": 2})
    made.set_epoch(1)
    later = [[sample["recipe"]] for sample in made]
    assert later[0] != wanted[0]
    assert shown(loader) == later[2:]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_start_methods_and_the_temporary_folder(stream, tmp_path, monkeypatch, method):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = stream(pairs=3, work=None)
    (folder,) = tmp_path.glob("synthlong-*")
    assert len(list(folder.iterdir())) == 2
    assert len(pickle.dumps(made)) < 1e5
    alone = list(made)
    loader = made.loader(num_workers=1, multiprocessing_context=method)
    for sample, batch in zip(alone, loader, strict=True):
        assert batch["recipe"] == [sample["recipe"]]
        assert all(torch.equal(batch[name][0], sample[name]) for name in VOLUMES)
    assert folder.exists(), "the ends of workers leave it alone"
    del made, loader
    gc.collect()
    assert not folder.exists()


def test_draws_of_a_transform_are_those_of_shards(run, manifest, work):
    stream = PairStream(manifest, CONFIG, 5, pairs=3, transform=draw, work=work)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    made = list(stream)
    assert torch.equal(torch.get_rng_state(), before)
    shards = ShardDataset(run, transform=draw, seed=5)
    assert all(torch.equal(made[k]["drawn"], shards[k]["drawn"]) for k in range(3))


def test_draws_differ_over_workers_and_epochs(stream):
    loader = stream(pairs=6, transform=draw).loader(num_workers=2, multiprocessing_context="fork")
    batches = [*loader, *loader]
    assert len({tuple(batch["drawn"][0].tolist()) for batch in batches}) == 12
    assert {int(batch["threads"]) for batch in batches} == {1}


def test_ranks_share_an_epoch_in_equal_parts(stream):
    whole = shown(stream(pairs=11, batch_size=2).loader())
    ranks = [stream(pairs=11, batch_size=2, rank=r, world_size=2) for r in range(2)]
    assert [len(s) for s in ranks] == [4, 4]  # 8 of the 11 pairs
    for workers in (0, 2):
        options = {"num_workers": workers, **({"multiprocessing_context": "fork"} if workers else {})}
        parts = []
        for part in ranks:
            part.set_epoch(0)
            parts.append(shown(part.loader(**options)))
        assert parts[0] == whole[0:4:2]
        assert parts[1] == whole[1:4:2]
    with pytest.raises(ConfigError, match="pairs = 3: 2 ranks with batches of 2 need 4"):
        stream(pairs=3, batch_size=2, rank=0, world_size=2)


@contextmanager
def processes(target, *arguments):
    """Forked processes, one for each tuple of arguments; all have ended after the block."""
    started = [get_context("fork").Process(target=_alone, args=(target, *args)) for args in arguments]
    for process in started:
        process.start()
    yield started
    for process in started:
        process.join(60)
        process.kill()


def _alone(target, *args):
    torch.set_num_threads(1)  # threads do not survive a fork
    target(*args)


def train(stream, meet, rank, out):
    """One of two ranks: an epoch with a collective step per batch, which hangs if one rank has more batches."""
    distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    seen = []
    for batch in stream.loader(num_workers=rank, **({"multiprocessing_context": "fork"} if rank else {})):
        distributed.all_reduce(torch.ones(1))
        seen += batch["recipe"]
    spawned = pickle.dumps(stream)
    distributed.destroy_process_group()
    there = [sample["recipe"] for sample in pickle.loads(spawned)]
    (out / f"{rank}.json").write_text(json.dumps([seen, there]))


def test_ranks_of_torch_distributed(stream, tmp_path):
    made = stream(pairs=5)
    wanted = [sample["recipe"] for sample in made]
    with processes(train, *((made, tmp_path / "meet", rank, tmp_path) for rank in range(2))):
        pass
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert seen == [[wanted[0:4:2]] * 2, [wanted[1:4:2]] * 2]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_loaded_place_goes_on_without_rendering_what_was_seen(stream, workers, monkeypatch):
    options = {"num_workers": workers, **({"multiprocessing_context": "fork"} if workers else {})}
    first = stream(pairs=9, batch_size=2).loader()
    wanted, states = [], [first.state_dict()]
    for _ in range(2):
        for batch in first:
            wanted.append(batch["recipe"])
            states.append(json.loads(json.dumps(first.state_dict())))
    assert [(s["epoch"], s["batches"]) for s in states[3:7]] == [(0, 3), (0, 4), (1, 0), (1, 1)]

    for done in (3, 5, 6):
        made = stream(pairs=9, batch_size=2)
        loader = made.loader(**options)
        loader.load_state_dict(states[done])
        assert loader.state_dict() == states[done]
        made.set_epoch(states[done]["epoch"])  # as a loop over epochs does; the place stays
        drawn = []
        with monkeypatch.context() as patch:
            patch.setattr("synthlong.dataset.stream.rng_of", _noting(drawn))
            rest = shown(loader)
        if workers == 0:
            assert drawn == list(range(min(2 * done - done // 5, 18), 9 if done < 5 else 18))
        assert rest == wanted[done : 5 if done < 5 else 10]
        assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (1 if done < 5 else 2, 0)


def _noting(drawn):
    from synthlong.recipe import rng_of

    def noting(seed, case, k):
        drawn.append(k)
        return rng_of(seed, case, k)

    return noting


def test_a_pass_broken_off_goes_on_at_the_next_batch(stream):
    made = stream(pairs=6)
    wanted = shown(made.loader())
    made.set_epoch(0)
    loader = made.loader(num_workers=2, multiprocessing_context="fork", persistent_workers=True)
    seen = []
    for batch in loader:
        seen.append(batch["recipe"])
        if len(seen) == 2:
            break
    assert loader.state_dict()["batches"] == 2, "what is prefetched does not count"
    old = iter(loader)
    seen.append(next(old)["recipe"])
    assert seen + shown(loader) == wanted
    made.set_epoch(0)
    assert shown(loader) == wanted


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed: 1 -> 2"),
        ({"pairs": 8}, "pairs: 6 -> 8"),
        ({"batch_size": 3}, "batch_size: 2 -> 3"),
        ({"rank": 1, "world_size": 2}, "ranks: 1 -> 2"),
    ],
)
def test_a_place_in_another_stream_is_refused(stream, small_case, change, named):
    options = {"pairs": 6, "batch_size": 2}
    state = stream(**options).loader().state_dict()
    with pytest.raises(ConfigError, match=named):
        stream(**(options | change)).loader().load_state_dict(state)


def test_a_state_of_other_cases_or_none_is_refused(stream, small_case, work):
    loader = stream(pairs=6).loader()
    state = loader.state_dict()
    with pytest.raises(ConfigError, match="cases: "):
        PairStream([small_case], PLAIN, 1, pairs=6, work=work).loader().load_state_dict(state)
    with pytest.raises(ConfigError, match="another stream"):
        loader.load_state_dict({})
    for wrong in ({"batches": 6}, {"batches": -1}, {"epoch": 1.5}, {"epoch": None}):
        with pytest.raises(ConfigError, match="no place in epochs of 6 batches"):
            loader.load_state_dict(state | wrong)
    assert loader.state_dict() == state


def train_and_die(stream, path):
    loader = stream.loader(num_workers=2, multiprocessing_context="fork")
    for n, _ in enumerate(loader):
        if n == 1:
            path.write_text(json.dumps(loader.state_dict()))
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_in_mid_epoch_and_resumed(run, manifest, work, tmp_path):
    made = PairStream(manifest, CONFIG, 3, pairs=4, work=work)
    with processes(train_and_die, (made, tmp_path / "state.json")) as (process,):
        pass
    assert process.exitcode == -signal.SIGKILL
    loader = PairStream(manifest, CONFIG, 3, pairs=4, work=work).loader(num_workers=1, multiprocessing_context="fork")
    loader.load_state_dict(json.loads((tmp_path / "state.json").read_text()))
    written = ShardDataset(run)
    for k, batch in zip((2, 3), loader, strict=True):
        assert batch["recipe"] == [written[k]["recipe"]]
        assert all(torch.equal(batch[name][0], written[k][name]) for name in VOLUMES)


def test_prepared_cases_are_used_again(stream, work, small_case, monkeypatch):
    wanted = list(stream(pairs=2, keys=["recipe"]))
    kept = sorted(work.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("synthlong.dataset.prepared.store_case", None)
        assert list(stream(pairs=2, keys=["recipe"])) == wanted
    assert sorted(work.iterdir()) == kept
    brighter = replace(small_case, flair=small_case.flair * np.float32(1.1))
    PairStream([brighter], PLAIN, work=work)
    PairStream([small_case], replace(PLAIN, margin=6), work=work)
    assert {*work.iterdir()} > {*kept}
    assert len([*work.iterdir()]) == len(kept) + 2
    assert list(stream(pairs=2, keys=["recipe"])) == wanted, "what is prepared otherwise lies beside"


def test_a_case_stored_by_two_at_once_is_whole(stream, tmp_path, monkeypatch):
    from synthlong.dataset import prepared as module

    honest, calls = module.store_case, []

    def raced(folder, *args, **options):
        if not calls:
            calls.append(folder)
            stream(pairs=2, work=tmp_path)  # another process, as it were
        honest(folder, *args, **options)

    monkeypatch.setattr(module, "store_case", raced)
    assert len(list(stream(pairs=2, work=tmp_path))) == 2
    assert len([*tmp_path.iterdir()]) == 2


def test_a_full_disk_and_a_bad_case_leave_nothing(stream, manifest, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("synthlong.dataset.store.np.save", full)
        with pytest.raises(OutputError, match=r"No space left on device.*name another folder"):
            stream(work=tmp_path)
        patch.setattr("tempfile.tempdir", str(tmp_path))
        with pytest.raises(OutputError, match="No space left on device"):
            stream(work=None)
    gc.collect()
    assert not list(tmp_path.iterdir())
    for file in manifest.parent.glob("cs*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "cases.csv").write_bytes(manifest.read_bytes())
    (tmp_path / "cs19_FLAIR.nii.gz").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"cs19_FLAIR\.nii\.gz: "):
        PairStream(tmp_path / "cases.csv", PLAIN, work=tmp_path / "work")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made"):
        stream(work=tmp_path / "file")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_that_vanished_is_named(stream, tmp_path, workers):
    made = stream(pairs=2, work=tmp_path / "gone")
    for file in (tmp_path / "gone").glob("*/flair.npy"):
        file.unlink()
    options = {"num_workers": workers, **({"multiprocessing_context": "fork"} if workers else {})}
    with pytest.raises(InputError, match=r"^[^/]+/case-.*cannot be opened.*make the stream anew") as caught:
        list(made.loader(**options))
    error = caught.value
    assert error.path.match("gone/case-*")
    assert error.problem.startswith("a prepared case cannot be opened")
    assert error.way_out.startswith("remove the folder")
    assert str(error).endswith("make the stream anew")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert [note.count("Original Traceback") for note in getattr(error, "__notes__", [])] == [1] * workers


def test_a_file_edited_before_it_is_read_is_named(manifest, tmp_path, monkeypatch):
    from synthlong.dataset import prepared as module

    for file in manifest.parent.glob("c*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    honest = module.stored_stamp

    def meanwhile(folder):  # called when all cases are hashed
        mask = tmp_path / "cs19_mask.nii.gz"
        mask.write_bytes(gzip.compress(gzip.decompress(mask.read_bytes()), compresslevel=0))
        return honest(folder)

    monkeypatch.setattr(module, "stored_stamp", meanwhile)
    with pytest.raises(InputError, match=r"cs19_mask\.nii\.gz: was changed while .*; make the stream anew"):
        PairStream(tmp_path / "cases.csv", PLAIN, work=tmp_path / "work")


def test_what_float16_cannot_hold_is_an_error(small_case, tmp_path):
    huge = replace(small_case, flair=small_case.flair * 1e6, healthy=small_case.healthy * 1e6)
    made = PairStream([huge], PLAIN, pairs=1, work=tmp_path)
    with pytest.raises(SynthlongError, match=r"pair 0 \(small\): baseline holds NaN or values beyond float16"):
        list(made)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pairs": 0}, "pairs = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"keys": ["baseline", "flair"]}, "flair"),
        ({"rank": 2, "world_size": 2}, "rank = 2, world_size = 2"),
        ({"rank": 0}, "give both"),
        ({"world_size": 0, "rank": 0}, "world_size = 0"),
    ],
)
def test_options_outside_their_range_are_named(stream, options, named):
    with pytest.raises(ConfigError, match=named):
        stream(**options)


def test_other_ways_to_go_wrong(stream, small_case, work):
    with pytest.raises(ConfigError, match="cases is empty"):
        PairStream([], PLAIN)
    with pytest.raises(InputError, match="small: two cases have this id"):
        PairStream([small_case, small_case], PLAIN, work=work)
    with pytest.raises(InputError, match="no such file"):
        PairStream(work / "cases.csv", PLAIN)
    made = stream(pairs=3, batch_size=4)
    with pytest.raises(ConfigError, match="epoch must be 0 or more"):
        made.set_epoch(-1)
    with pytest.raises(ConfigError, match="batch_size is the stream's"):
        made.loader(batch_size=2)
    with pytest.raises(ConfigError, match="in_order"):
        made.loader(num_workers=1, in_order=False)
    with pytest.raises(ConfigError, match="drop_last leaves no batch of 4 in 3 pairs"):
        list(made.loader(drop_last=True))


def test_drop_last_ends_an_epoch_too(stream):
    loader = stream(pairs=5, batch_size=2).loader(drop_last=True)
    assert [len(batch["recipe"]) for batch in loader] == [2, 2]
    assert loader.state_dict()["epoch"] == 1


def test_an_endless_epoch_takes_no_memory(stream, monkeypatch):
    made = stream(pairs=10**6)
    monkeypatch.setattr("synthlong.dataset.stream.check_assets", lambda *_: None)  # which reads them
    tracemalloc.start()
    try:
        iter(made)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_files_named_from_another_folder_are_still_read(small_case, work, tmp_path, monkeypatch):
    shutil.copy(LesionBank.default_path(), tmp_path / "bank.npz")
    monkeypatch.chdir(tmp_path)
    made = PairStream([small_case], replace(PLAIN, lesion_bank="bank.npz"), pairs=1, keys=["recipe"], work=work)
    monkeypatch.chdir(work)
    assert len(list(made)) == 1


def test_recipes_name_cases_in_turn(stream):
    recipes = [Recipe.from_json(sample["recipe"]) for sample in stream(pairs=3)]
    assert [recipe.case_id for recipe in recipes] == ["a", "b", "a"]
