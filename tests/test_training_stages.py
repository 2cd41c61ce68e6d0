import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from running import started, wait_for
from synthlong_cli.main import main
from training import write_balls, write_scans

from synthlong.artifacts import RandomAcquisition, acquire
from synthlong.bank import LesionBank
from synthlong.detection.networks import SegmentationUNet, SiameseUNet
from synthlong.errors import ConfigError, InputError, OutputError
from synthlong.networks import UNetConfig
from synthlong.orientation import draw_orientation
from synthlong.synthesis import SynthesisConfig
from synthlong.training import stages
from synthlong.training.augmented import AugmentedPatches
from synthlong.training.loop import seeded_weights
from synthlong.training.patches import read_patches
from synthlong.training.seen import MadePairs, _Made
from synthlong.training.sides import rng_at
from synthlong.training.stage_config import FinetuneConfig, PretrainConfig, SegmentConfig
from synthlong.training.stages import finetune, pretrain
from synthlong.weights import read_weights, write_weights

TINY = {
    "side": 16,
    "steps": 4,
    "batch": 2,
    "folds": 2,
    "validation_patches": 4,
    "report_every": 2,
    "checkpoint_every": 3,
    "precision": "float32",
}
SIZE = UNetConfig(widths=(8, 16))
CARD = {"licence": "CC0"}

pytestmark = [
    pytest.mark.filterwarnings("ignore::synthlong.errors.InputWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_balls(tmp_path_factory.mktemp("balls"))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Weights of the first two stages, as drawn."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    network = SegmentationUNet(SIZE)
    write_weights(folder / "s.safetensors", network, task="segmentation", card={})
    write_weights(folder / "p.safetensors", SiameseUNet.from_segmentation(network), task="siamese", card={})
    return folder


def called(folder, stage, *words, synthesis="", **options):
    """Run a verb with the tiny config; return its card."""
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in (TINY | options).items()]
    (folder / "c.toml").write_text("".join(lines) + synthesis)
    words = ["train", stage, *words, "--config", folder / "c.toml", "--no-tensorboard", "--threads", 1]
    assert main([str(word) for word in words]) == 0


def same_encoder(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.down.parameters(), other.down.parameters(), strict=True))


def changed(one, other, part):
    pairs = zip(getattr(one, part).parameters(), getattr(other, part).parameters(), strict=True)
    return all(not torch.equal(a, b) for a, b in pairs if a.ndim > 1)


def test_the_defaults_are_those_of_the_paper():
    for config in (SegmentConfig(), PretrainConfig(), FinetuneConfig()):
        assert (config.side, config.loss, config.learning_rate, config.schedule) == (64, "dice", 1e-4, "constant")
        assert {config.learning_rate_at(step) for step in (0, 10_000, 19_999)} == {1e-4}
    assert SegmentConfig().artifacts == FinetuneConfig().artifacts == PretrainConfig().synthesis.artifacts == "kamraoui"
    assert PretrainConfig().trainable == FinetuneConfig().trainable == "decoder"
    assert FinetuneConfig().folds == 5


def test_cosine():
    config = SegmentConfig(schedule="cosine", steps=1000)
    rates = [config.learning_rate_at(step) for step in range(1000)]
    assert np.argmax(rates) in (29, 30)
    assert rates[0] < 1e-5
    assert 0 < rates[-1] < 1e-9
    assert rates[500] == pytest.approx(5e-5)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (SegmentConfig, {"side": 30}, "multiple of 4"),
        (SegmentConfig, {"widths": (10,)}, "multiples of 8"),
        (SegmentConfig, {"widths": (8.9, 16.5)}, "multiples of 8"),
        (SegmentConfig, {"artifacts": "heavy"}, "artifacts"),
        (FinetuneConfig, {"orientations": "some"}, "orientations"),
        (FinetuneConfig, {"schedule": "linear"}, "schedule"),
        (PretrainConfig, {"trainable": "head"}, "trainable"),
        (PretrainConfig, {"synthesis": {"boxes": 3}}, "synthesis: unknown option 'boxes'; did you mean box"),
        (PretrainConfig, {"synthesis": 3}, "synthesis"),
    ],
)
def test_options_outside_their_range(kind, options, said):
    with pytest.raises(ConfigError, match=said):
        kind(**options)


def test_a_table_overrules_the_default_of_its_config(tmp_path):
    (tmp_path / "c.toml").write_text('steps = 3\n[synthesis]\npainter = "ellipsoid"\nprior = "p.nii"\n')
    made = PretrainConfig.from_toml(tmp_path / "c.toml").synthesis
    prior = str((tmp_path / "p.nii").resolve())
    assert made == SynthesisConfig(artifacts="kamraoui", painter="ellipsoid", prior=prior)


def test_the_batch_of_a_step_is_the_same_for_any_number_of_processes(run):
    patches = read_patches(run, side=8, split="train", fold=0, folds=2, network=SiameseUNet)
    whole = PretrainConfig(side=8, batch=4).draw(patches, 3, 0)
    parts = [PretrainConfig(side=8, batch=4, devices=2).draw(patches, 3, rank) for rank in (0, 1)]
    for one, *dealt in zip(whole, *parts, strict=True):
        assert all(np.array_equal(one[rank::2], part) for rank, part in enumerate(dealt))
    assert whole[2][:2].any(axis=(1, 2, 3, 4)).all()
    assert whole[0].mean() == pytest.approx(1, abs=0.05)  # brain mode 1, not z-scored


@pytest.mark.parametrize(("batch", "share"), [(1, 0.5), (4, 0.5), (5, 0.3), (3, 1.0), (2, 0.0)])
def test_the_share_of_positive_patches_is_kept_over_the_steps(batch, share):
    class Counting:
        count = 0

        def draw(self, rng, count, positive):
            self.count += positive
            return (np.zeros(1),)

    counting, config = Counting(), PretrainConfig(batch=batch, positive_share=share)
    for step in range(40):
        config.draw(counting, step, 0)
    assert counting.count == round(40 * batch * share)


def test_orientation_and_acquisition_are_those_drawn(run):
    patches = read_patches(run, side=8, split="train", fold=0, folds=2, network=SiameseUNet)
    drawn = AugmentedPatches(patches, artifacts="kamraoui", orientations="all").draw(rng_at(0, 1, 2), 1, 1)
    rng = rng_at(0, 1, 2)
    *visits, mask = patches.draw(rng, 1, 1)
    turn, acquisition = draw_orientation(rng, "all"), RandomAcquisition("kamraoui")
    assert np.array_equal(drawn[2][0, 0], turn.apply(mask[0, 0]))
    affine = turn.apply_affine(np.eye(4), (8, 8, 8))
    for visit, made in zip(visits, drawn, strict=False):
        x = torch.from_numpy(turn.apply(visit[0, 0]))[None]
        steps = acquisition.draw_params(rng)["steps"]
        assert steps
        assert np.array_equal(made[0], acquire(x, steps=steps, affine=affine).numpy())


def test_what_lies_beyond_a_patch_moves_into_it():
    class Whole:
        """A patch of 16 voxels in the middle of a scan, alone or with the 8 around it."""

        subjects = ()

        def __init__(self, margin):
            self.margin = margin

        def draw(self, rng, count, positive):
            scan = np.full((count, 1, 32, 32, 32), 1, np.float32)
            scan[:, :, 8:24, 8:24, 8:24] = 2
            inner = slice(8 - self.margin, 24 + self.margin)
            visit = scan[:, :, inner, inner, inner].copy()
            return visit, (visit == 2).astype(np.uint8)

    config = {"artifacts": "kamraoui", "orientations": "all"}
    bare, whole = (AugmentedPatches(Whole(m), **config).draw(rng_at(0, 0, 1), 8, 0) for m in (0, 8))
    assert bare[0].shape == whole[0].shape == (8, 1, 16, 16, 16)
    assert whole[1].all()
    assert whole[0].min() > bare[0].min()
    plain = {"artifacts": "none", "orientations": "all"}
    bare, whole = (AugmentedPatches(Whole(m), **plain).draw(rng_at(0, 0, 1), 8, 0) for m in (0, 8))
    assert all(np.array_equal(one, other) for one, other in zip(bare, whole, strict=True))


def test_background_stays_0_and_nothing_drawn_changes_nothing(run):
    class Half:
        subjects, margin = (), 0

        def draw(self, rng, count, positive):
            visit = np.ones((count, 1, 8, 8, 8), np.float32)
            visit[..., :4] = 0
            return visit, np.zeros(visit.shape, np.uint8)

    made, _ = AugmentedPatches(Half(), artifacts="kamraoui", orientations="none").draw(rng_at(0, 0, 0), 5, 0)
    assert not made[..., :4].any()
    assert (made != 1).any()
    made, _ = AugmentedPatches(Half(), artifacts="none", orientations="none").draw(rng_at(0, 0, 0), 5, 0)
    assert np.array_equal(made, Half().draw(None, 5, 0)[0])


def test_segment(manifest, tmp_path):
    called(tmp_path, "segment", manifest, "-o", tmp_path / "s.safetensors", widths=[8, 16])
    network, _ = read_weights(tmp_path / "s.safetensors", task="segmentation")
    card = json.loads((tmp_path / "s.json").read_text())
    assert network.config == SIZE
    assert len(card["patients"]) == len(card["held_out"]) == 1
    assert [point["step"] for point in card["curve"]] == [2, 4]
    assert card["command"].startswith("synthlong train segment cases.csv -o s.safetensors --config c.toml")


def test_pretrain_on_shards_learns_and_keeps_the_encoder(run, first, tmp_path):
    config = PretrainConfig(**(TINY | {"steps": 60, "report_every": 10, "learning_rate": 1e-2}))
    options = {"encoder": first / "s.safetensors", "config": config, "card": CARD, "tensorboard": False}
    curve = pretrain(run, tmp_path / "p.safetensors", **options)["curve"]
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]
    made, _ = read_weights(tmp_path / "p.safetensors", task="siamese")
    before, _ = read_weights(first / "p.safetensors", task="siamese")
    encoder, sha256 = read_weights(first / "s.safetensors", task="segmentation")
    assert same_encoder(made, encoder)
    assert changed(made, before, "merge")
    assert changed(made, before, "up")
    card = json.loads((tmp_path / "p.json").read_text())
    assert card["encoder"] == sha256
    assert card["train"]["synthesis"]["artifacts"] == "mild"  # as the shards say


def test_options_of_synthesis_beside_shards_are_refused(run, first, tmp_path):
    config = PretrainConfig(**TINY, synthesis={"painter": "ellipsoid"})
    with pytest.raises(ConfigError, match="shards say how their pairs were made"):
        pretrain(run, tmp_path / "p.safetensors", encoder=first / "s.safetensors", config=config, card=CARD)


def test_the_encoder_may_learn_too(run, first, tmp_path):
    config = PretrainConfig(**TINY, trainable="all")
    options = {"encoder": first / "s.safetensors", "config": config, "card": CARD, "tensorboard": False}
    (tmp_path / "p.work").mkdir()
    pretrain(run, tmp_path / "p.safetensors", **options)
    assert (tmp_path / "p.work").exists()  # it is not its own
    made, _ = read_weights(tmp_path / "p.safetensors", task="siamese")
    assert not same_encoder(made, read_weights(first / "s.safetensors", task="segmentation")[0])


def test_with_one_fold_all_patients_are_learned_from_and_the_last_weights_kept(run, first, tmp_path):
    options = {"encoder": first / "s.safetensors", "card": CARD, "tensorboard": False}
    made = []
    for every in (2, 6):  # were the best loss kept, these would differ
        config = PretrainConfig(**TINY | {"folds": 1, "steps": 6, "report_every": every})
        figures = pretrain(run, tmp_path / f"p{every}.safetensors", config=config, **options)
        assert figures["best"] == figures["curve"][-1]
        assert figures["best"].keys() == {"step", "loss"}
        made.append((tmp_path / f"p{every}.safetensors").read_bytes())
    card = json.loads((tmp_path / "p2.json").read_text())
    assert (card["patients"], card["held_out"]) == ([f"sub-{n}" for n in range(4)], [])
    assert read_weights(tmp_path / "p2.safetensors", task="siamese")
    assert made[0] == made[1]


def test_finetune_makes_a_network_for_each_fold(manifest, first, tmp_path, capsys):
    pairs = write_scans(tmp_path, manifest)
    words = [pairs, "-o", tmp_path / "w.safetensors", "--weights", first / "p.safetensors"]
    called(tmp_path, "finetune", *words, folds=2)
    before, sha256 = read_weights(first / "p.safetensors", task="siamese")
    held_out = []
    for fold in range(2):
        made, _ = read_weights(tmp_path / f"w.fold-{fold}.safetensors", task="siamese")
        card = json.loads((tmp_path / f"w.fold-{fold}.json").read_text())
        assert same_encoder(made, before)
        assert changed(made, before, "merge")
        assert card["weights"] == sha256
        assert card["train"]["fold"] == fold
        held_out += card["held_out"]
    assert sorted(held_out) == ["a", "b", "c"]
    times = [(tmp_path / f"w.fold-{fold}.safetensors").stat().st_mtime_ns for fold in range(2)]
    (tmp_path / "w.fold-1.safetensors").unlink()
    called(tmp_path, "finetune", *words, folds=2)
    again = [(tmp_path / f"w.fold-{fold}.safetensors").stat().st_mtime_ns for fold in range(2)]
    assert times[0] == again[0]
    assert times[1] < again[1]
    for fold in range(2):  # in the file, 0 is as good a number as any
        words[2] = tmp_path / f"alone{fold}.safetensors"
        called(tmp_path, "finetune", *words, folds=2, fold=fold)
        assert sorted(p.name for p in tmp_path.glob("alone*.safetensors"))[fold:] == [
            f"alone{fold}.fold-{fold}.safetensors"
        ]


def test_a_killed_training_goes_on_to_the_same_bits(run, first, tmp_path):
    options = {"steps": 30, "checkpoint_every": 4, "report_every": 10}
    called(
        tmp_path, "pretrain", run, "-o", tmp_path / "whole.safetensors", "--encoder", first / "s.safetensors", **options
    )
    cut = ["pretrain", run, "-o", tmp_path / "cut.safetensors", "--encoder", first / "s.safetensors"]
    with started("train", *cut, "--config", tmp_path / "c.toml", "--no-tensorboard", "--threads", 1) as process:
        wait_for((tmp_path / "cut.checkpoint").exists, process)
        process.kill()
    assert torch.load(tmp_path / "cut.checkpoint", weights_only=True)["global_step"] < 30
    called(tmp_path, *cut, **options)
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "cut.safetensors").read_bytes()


def test_two_processes_make_the_steps_of_one(run, first, tmp_path):
    """As DDP on GPUs would: each sees its part of a batch, and both learn from all of it."""
    options = {"loss": "bce", "batch": 4, "learning_rate": 1e-3, "folds": 1}
    begin = ["--encoder", first / "s.safetensors"]
    called(tmp_path, "pretrain", run, "-o", tmp_path / "one.safetensors", *begin, **options)
    words = ["pretrain", run, "-o", tmp_path / "two.safetensors", *begin, "--config", tmp_path / "c.toml"]
    with started("train", *words, "--devices", 2, "--no-tensorboard", "--threads", 1) as process:
        said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    names = ("one", "two")
    losses = [[p["loss"] for p in json.loads((tmp_path / f"{n}.json").read_text())["curve"]] for n in names]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, two = (read_weights(tmp_path / f"{n}.safetensors", task="siamese")[0].state_dict() for n in names)
    encoder, _ = read_weights(first / "s.safetensors", task="segmentation")
    with seeded_weights(0):
        start = SiameseUNet.from_segmentation(encoder).state_dict()
    learned = [key for key in one if key.startswith("merge")]
    assert min((one[key] - start[key]).abs().mean() for key in learned) > 1e-4
    assert max((one[key] - two[key]).abs().mean() for key in learned) < 1e-6


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_makers_of_pairs_go_on_after_a_signal(asked, manifest, tmp_path):
    config = PretrainConfig(**TINY | {"steps": 12, "synthesis": SynthesisConfig(painter="ellipsoid")})
    batches = iter(MadePairs(manifest, config, work=tmp_path / "work", readers=1).batches(0, rank=0))
    others = set(multiprocessing.active_children())
    next(batches)
    (maker,) = set(multiprocessing.active_children()) - others
    os.kill(maker.pid, asked)
    assert len(list(batches)) == 11  # more than were made in advance


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", ["two ranks", "two makers of pairs"])
def test_a_signal_to_all_processes_saves_the_step(asked, processes, manifest, run, first, tmp_path):
    """As a scheduler sends it: to every process of a job."""
    source, made = (run, "w.tensorboard") if processes == "two ranks" else (manifest, "w.work")
    options = TINY | {"steps": 500, "checkpoint_every": 1, "batch": 4}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())
    (tmp_path / "c.toml").write_text(text + '[synthesis]\npainter = "ellipsoid"\n' * (source is manifest))
    words = ["train", "pretrain", source, "-o", tmp_path / "w.safetensors", "--encoder", first / "s.safetensors"]
    words += ["--config", tmp_path / "c.toml", "--threads", 1, "--devices", 2 if source is run else 1]
    with started(*words) as process:
        wait_for((tmp_path / "w.checkpoint").exists, process)
        os.killpg(process.pid, asked)
        _, said = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[asked], said
    assert said.count("go on with: synthlong train pretrain") == 1, said
    assert (tmp_path / made).exists()
    state = torch.load(tmp_path / "w.checkpoint", weights_only=True)
    assert 0 < state["global_step"] < 500
    assert not list(tmp_path.glob("*.tmp-*"))


def test_another_trainings_checkpoint_in_this_folder_is_left_alone(run, first, tmp_path, monkeypatch):
    """Lightning writes `hpc_ckpt_1.ckpt` when Slurm is about to end a job, and goes on from any that it finds."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "JOB_ID": 1,
        "JOB_NAME": "x",
        "NTASKS": 1,
        "NODELIST": "here",
        "PROCID": 0,
        "LOCALID": 0,
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    config = PretrainConfig(**TINY | {"checkpoint_every": 1})
    options = {"encoder": first / "s.safetensors", "card": CARD, "tensorboard": False}

    def stop(done, *_):
        if done == 3:
            signal.raise_signal(signal.SIGUSR1)
            raise StopError

    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with pytest.raises(StopError):
            pretrain(run, Path("cut.safetensors"), config=replace(config, seed=1), progress=stop, **options)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not list(tmp_path.glob("hpc_ckpt*"))
    shutil.copy("cut.checkpoint", "hpc_ckpt_1.ckpt")
    figures = pretrain(run, Path("fresh.safetensors"), config=config, **options)
    assert [point["step"] for point in figures["curve"]] == [2, 4]
    assert pretrain(run, Path("again.safetensors"), config=config, **options)["curve"] == figures["curve"]
    os.unlink("hpc_ckpt_1.ckpt")
    assert pretrain(run, Path("alone.safetensors"), config=config, **options)["curve"] == figures["curve"]


def test_one_training_at_a_time_writes_a_file(run, first, tmp_path):
    config, said = PretrainConfig(**TINY), []
    options = {"encoder": first / "s.safetensors", "config": config, "card": CARD, "tensorboard": False}

    def begin_another(done, *_):
        if done == 2:
            with pytest.raises(OutputError, match=r"w\.safetensors: locked by process \d+") as refusal:
                pretrain(run, tmp_path / "w.safetensors", **options)
            said.append(refusal)

    pretrain(run, tmp_path / "w.safetensors", progress=begin_another, **options)
    assert said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.json", "w.safetensors"]


def test_other_assets_are_another_training(manifest, first, tmp_path):
    shutil.copy(LesionBank.default_path(), tmp_path / "bank.npz")
    (tmp_path / "c.toml").write_text('[synthesis]\npainter = "ellipsoid"\nlesion_bank = "bank.npz"\n')
    config = PretrainConfig.from_toml(tmp_path / "c.toml", **TINY)
    options = {"encoder": first / "s.safetensors", "config": config, "card": CARD, "tensorboard": False, "readers": 0}

    def stop(done, *_):
        if done == 3:
            raise StopError

    with pytest.raises(StopError):
        pretrain(
            manifest,
            tmp_path / "w.safetensors",
            progress=stop,
            **options | {"config": replace(config, checkpoint_every=1)},
        )
    assert str(tmp_path).encode() not in (tmp_path / "w.checkpoint").read_bytes()
    bank = dict(np.load(tmp_path / "bank.npz"))
    np.savez(tmp_path / "bank.npz", **bank)  # the same shapes, other bytes
    with pytest.raises(
        InputError, match=r"of another training \(assets\.lesion_bank: .* -> .*; checkpoint_every: 1 -> 3"
    ):
        pretrain(manifest, tmp_path / "w.safetensors", **options)
    assert (tmp_path / "w.checkpoint").exists()


class StopError(Exception):
    """Something that ends a training."""


def test_pairs_made_on_the_fly_go_on_in_mid_epoch(manifest, first, tmp_path):
    config = PretrainConfig(**TINY, synthesis={"painter": "ellipsoid"})
    options = {"encoder": first / "s.safetensors", "config": config, "card": CARD, "tensorboard": False}

    def stop(done, *_):
        if done == 4:
            raise StopError

    with pytest.raises(StopError):
        pretrain(manifest, tmp_path / "cut.safetensors", readers=0, progress=stop, **options)
    shutil.copytree(tmp_path / "cut.work", tmp_path / "whole.work")  # saves the time to prepare it again
    pretrain(manifest, tmp_path / "cut.safetensors", readers=0, **options)
    pretrain(manifest, tmp_path / "whole.safetensors", readers=2, **options)
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "cut.safetensors").read_bytes()
    assert not (tmp_path / "cut.work").exists()
    assert list(_Made(None, steps=range(30, 30), workers=0)) == []  # stopped after its last step
    card = json.loads((tmp_path / "whole.json").read_text())
    assert not set(card["patients"]) & set(card["held_out"])
    assert card["train"]["synthesis"]["box"] == 16


def test_what_is_finished_stays(manifest, first, tmp_path):
    pairs, out = write_scans(tmp_path, manifest), tmp_path / "w.safetensors"
    options = {"weights": first / "p.safetensors", "card": CARD, "tensorboard": False}
    config = FinetuneConfig(**TINY | {"folds": 1, "steps": 2})
    finetune(pairs, out, config=config, **options)
    files = {path: path.read_bytes() for path in (out, out.with_suffix(".json"))}
    finetune(pairs, out, config=config, **options)
    with pytest.raises(InputError, match=r"w.safetensors: .*another training \(seed: 0 -> 5; steps: 2 -> 3\)"):
        finetune(pairs, out, config=replace(config, steps=3, seed=5), **options)
    volume = nib.load(tmp_path / "a_followup.nii.gz")
    nib.save(nib.Nifti1Image(volume.get_fdata(dtype=np.float32) * 2, volume.affine), volume.get_filename())
    with pytest.raises(InputError, match=r"another training \(source: "):
        finetune(pairs, out, config=config, **options)
    assert files == {path: path.read_bytes() for path in files}
    (tmp_path / "cohort.json").write_text("[]")
    with pytest.raises(InputError, match=r"cohort.json: is there already, and this training did not write it"):
        finetune(pairs, tmp_path / "cohort.safetensors", config=config, **options)
    assert (tmp_path / "cohort.json").read_text() == "[]"


def test_a_fold_without_new_lesions_is_found_before_the_first_training(manifest, first, tmp_path, monkeypatch):
    pairs = write_scans(tmp_path, manifest)  # of three patients the last has nothing new
    monkeypatch.setattr(stages, "fit", None)
    with pytest.raises(InputError, match=r"pairs.csv: none of the patients held out in fold \d has a new lesion"):
        finetune(
            pairs,
            tmp_path / "w.safetensors",
            weights=first / "p.safetensors",
            config=FinetuneConfig(**TINY | {"folds": 3}),
            card=CARD,
        )


@pytest.mark.parametrize(("options", "said"), [({"side": 8}, "side = 8"), ({"synthesis": {"box": 32}}, "box = 32")])
def test_pairs_on_the_fly_are_as_large_as_patches(options, said, manifest, first, tmp_path):
    config = PretrainConfig(**TINY | options)
    with pytest.raises(ConfigError, match=said):
        pretrain(manifest, tmp_path / "p.safetensors", encoder=first / "s.safetensors", config=config, card=CARD)


def test_bad_inputs(run, first, tmp_path, capsys):
    out = tmp_path / "w.safetensors"
    bad = [
        (["pretrain", run, "-o", out, "--encoder", first / "p.safetensors"], "weights of the siamese"),
        (["pretrain", run, "-o", out, "--encoder", first / "none.safetensors"], "train segment"),
        (["pretrain", run, "-o", out, "--encoder", first / "s.safetensors", "--side", 15], "multiple of 2"),
        (["finetune", run, "-o", out, "--weights", first / "s.safetensors"], "train pretrain"),
        (["pretrain", run, "-o", first / "s.safetensors", "--encoder", first / "s.safetensors"], "choose another name"),
        (["segment", tmp_path / "none", "-o", out], "no such file or folder"),
        (["segment", run, "-o", tmp_path / "w.pt"], "named *.safetensors"),
        (["ohem", tmp_path, "-o", out], "holds no run of pairs; pass what `synthlong generate` wrote, or a CSV"),
        (["segment", run, "-o", "/proc/none/w.safetensors"], "proc/none: "),
        (["finetune", run, "-o", out, "--weights", tmp_path / "none.safetensors"], "with `synthlong train pretrain`\n"),
    ]
    for words, said in bad:
        assert main(["train", *map(str, words)]) in (1, 2, 3)
        assert said in capsys.readouterr().err


def test_a_checkpoint_of_another_stage_is_refused(run, first, tmp_path):
    torch.save({"ohem": {}}, tmp_path / "p.checkpoint")
    options = {"encoder": first / "s.safetensors", "config": PretrainConfig(**TINY), "card": CARD}
    with pytest.raises(InputError, match="of another stage"):
        pretrain(run, tmp_path / "p.safetensors", tensorboard=False, **options)
    assert not Path(tmp_path / "p.safetensors").exists()
