import json
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from running import asking_to_stop, started, stopped, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from training import write_balls

from synthlong.dataset.run import generate
from synthlong.errors import ConfigError, InputError, InputWarning
from synthlong.synthesis import SynthesisConfig
from synthlong.training import losses, ohem
from synthlong.training.ohem import Ohem, OhemConfig, train_ohem
from synthlong.training.patches import read_patches
from synthlong.weights import read_weights

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "candidates": 12,
    "batch": 4,
    "side": 16,
    "widths": (8, 16),
    "steps": 20,
    "folds": 2,
    "validation_patches": 10,
    "report_every": 10,
    "checkpoint_every": 7,
    "precision": "float32",
    "mining_precision": "float32",
}
CONFIG = OhemConfig(**TINY)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_balls(tmp_path_factory.mktemp("balls"))


@pytest.fixture
def model(run):
    patches = read_patches(run, side=16, split="train", fold=0, folds=2)
    torch.manual_seed(0)
    return lambda config=CONFIG: Ohem(config, patches, patches, about={}, checkpoint=run / "none")


def train(run, out, config=CONFIG, **options):
    return train_ohem(run, out, config=config, card={"licence": "CC0"}, tensorboard=False, **options)


def test_the_defaults_are_those_of_the_paper():
    config = OhemConfig()
    assert (config.candidates, config.batch, config.momentum, config.side, config.steps) == (128, 32, 0.9, 32, 30_000)
    rates = [config.learning_rate_at(step) for step in (0, 14_999, 15_000, 23_999, 24_000)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5])


def test_share_of_positive_patches():
    counts = []

    class Counting:
        def draw(self, rng, count, positive):
            counts.append((count, positive))

    OhemConfig().draw(Counting(), 0, 0)
    OhemConfig(mining=False, positive_share=0.0).draw(Counting(), 0, 0)
    for step in range(200):
        OhemConfig(mining=False, positive_share=0.5).draw(Counting(), step, 0)
    assert counts[:2] == [(128, 38), (32, 0)]
    assert np.mean([positive for _, positive in counts[2:]]) == pytest.approx(16, abs=1)
    for devices in (1, 2, 16, 32):
        counts.clear()
        for rank in range(devices):
            OhemConfig(devices=devices).draw(Counting(), 0, rank)
        assert np.sum(counts, axis=0).tolist() == [128, 38]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"momentum": 1.0}, "momentum"),
        ({"batch": 64, "candidates": 32}, "at most the candidates"),
        ({"side": 30}, "multiple of 4"),
        ({"window": 30}, "multiple of 4"),
        ({"loss": "mse"}, "loss"),
        ({"widths": (10,)}, "multiples of 8"),
        ({"widths": (8.9, 16.5)}, "multiples of 8"),
        ({"widths": (float("inf"), 16)}, "multiples of 8"),
        ({"learning_rate": 1e38}, r"learning_rate = 1e\+38: must be above 0, at most 1"),
        ({"devices": 3}, "multiple of the 3 processes"),
        ({"devices": 3, "batch": 33}, "candidates = 128: must be a multiple of the 3 processes"),
        ({"devices": 32, "validation_patches": 31}, "validation_patches = 31: must be at least the 32 processes"),
        ({"device": "abacus"}, "device"),
        ({"folds": 0}, "folds = 0: must be 1 or more"),
    ],
)
def test_options_outside_their_range(options, said):
    with pytest.raises(ConfigError, match=said):
        OhemConfig(**options)


def test_errors_against_their_definitions():
    logits, truth = torch.randn(3, 1, 4, 4, 4), (torch.rand(3, 1, 4, 4, 4) < 0.3).byte()
    p, t = logits.sigmoid(), truth.float()
    for n in range(3):
        bce = F.binary_cross_entropy(p[n], t[n])
        dice = 1 - (2 * (p[n] * t[n]).sum() + 1) / (p[n].sum() + t[n].sum() + 1)
        for kind, expected in (("bce", bce), ("dice", dice), ("bce+dice", bce + dice)):
            assert torch.allclose(losses.errors_of(logits, truth, kind)[n], expected, atol=1e-6)


def test_the_hardest_are_those_that_the_average_gets_most_wrong(model):
    it = model()
    batch = [torch.from_numpy(d) for d in CONFIG.draw(it._training, 0, 0)]
    with torch.no_grad():
        one_by_one = [it.average(batch[0][n : n + 1], batch[1][n : n + 1]) for n in range(12)]
    errors = [F.binary_cross_entropy_with_logits(y, batch[2][n : n + 1].float()) for n, y in enumerate(one_by_one)]
    errors = torch.stack(errors)  # some are equal: a small run gives the same patch twice
    assert torch.allclose(errors[it.hardest(*batch)], errors.topk(4).values, atol=1e-6)


def test_each_process_keeps_its_share_of_the_hardest(model):
    it = model(replace(CONFIG, devices=2))
    batch = [torch.from_numpy(d) for d in CONFIG.draw(it._training, 0, 0)]
    assert len(it.hardest(*batch)) == CONFIG.batch // 2


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_are_validated_on_the_same_share_of_positive_patches(model, share):
    it = model(replace(CONFIG, positive_share=share))
    same, other = it.validation(), model().validation()
    assert all(np.array_equal(a, b) for a, b in zip(same, other, strict=True))


def test_predictions_in_bf16_are_rough_and_returned_in_float32(model):
    it = model()
    visits = torch.rand(2, 6, 1, 16, 16, 16)
    with torch.no_grad():
        exact, rough = (losses.predicted(it.network, visits, precision) for precision in ("float32", "bf16"))
        assert torch.allclose(exact, it.network(*visits), atol=1e-5)
    assert exact.dtype == rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().max() < 0.1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_average_follows(model, momentum):
    it = model(replace(CONFIG, momentum=momentum))
    before = [a.clone() for a in it.average.parameters()]
    assert all(torch.equal(a, w) for a, w in zip(before, it.network.parameters(), strict=True))
    with torch.no_grad():
        for w in it.network.parameters():
            w += torch.randn_like(w)
    it.follow()
    for a, old, w in zip(it.average.parameters(), before, it.network.parameters(), strict=True):
        assert not a.requires_grad
        assert torch.allclose(a, momentum * old + (1 - momentum) * w, atol=1e-6)
        assert momentum or torch.equal(a, w)


def test_it_learns_and_keeps_the_best(run, tmp_path):
    seen = []
    config = replace(CONFIG, steps=60, learning_rate=1e-2)
    figures = train(run, tmp_path / "w.safetensors", config, progress=lambda *point: seen.append(point[:2]))
    assert seen == [(n, 60) for n in range(1, 61)]
    assert [p["step"] for p in figures["curve"]] == [10, 20, 30, 40, 50, 60]
    assert figures["best"]["dice"] == max(p["dice"] for p in figures["curve"]) > 0.5
    network, _ = read_weights(tmp_path / "w.safetensors", task="concat")
    assert network.config == config.network
    card = json.loads((tmp_path / "w.json").read_text())
    assert OhemConfig.from_dict(card["train"]) == config
    assert not set(card["patients"]) & set(card["held_out"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.json", "w.safetensors"]


def test_of_equals_the_last_weights_are_kept(model):
    points = [{"step": 1, "dice": 0.0}, {"step": 2, "dice": 0.3}, {"step": 3, "dice": 0.3}, {"step": 4, "dice": 0.1}]
    trained = model()
    for count, best in ((1, 1), (2, 2), (3, 3), (4, 3)):
        trained.curve = points[:count]
        assert trained.best_point["step"] == best
    trained.curve = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]  # nobody is held out
    assert trained.best_point["step"] == 2


def test_the_weights_say_how_wide_windows_are(run, tmp_path):
    for window in (32, 48):
        out = tmp_path / f"{window}.safetensors"
        train(run, out, replace(CONFIG, steps=1, window=window))
        assert read_weights(out, task="concat")[0].window == window


def test_fixed_oversampling_has_no_mining(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Ohem, "hardest", None)
    figures = train(run, tmp_path / "w.safetensors", replace(CONFIG, mining=False, positive_share=0.5))
    assert len(figures["curve"]) == 2


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_mining_in_bf16(run, tmp_path, precision):
    config = replace(CONFIG, steps=2, report_every=2, precision=precision, mining_precision="bf16")
    assert np.isfinite(train(run, tmp_path / "w.safetensors", config)["curve"][0]["loss"])


def test_tensorboard_has_every_point_of_the_curve(run, tmp_path):
    config = replace(CONFIG, steps=5, report_every=2)
    curve = train_ohem(run, tmp_path / "w.safetensors", config=config, card={})["curve"]
    log = EventAccumulator(str(tmp_path / "w.tensorboard")).Reload()
    for tag, name in (("loss", "loss"), ("validation_dice", "dice")):
        points = [(event.step, event.value) for event in log.Scalars(tag)]
        assert points == [(point["step"], pytest.approx(point[name])) for point in curve]


class StopError(Exception):
    """Something that ends a training."""


def test_a_checkpoint_of_another_training_is_refused(run, tmp_path):
    def stop(done, *_):
        if done == 8:
            raise StopError

    out = tmp_path / "w.safetensors"
    with pytest.raises(StopError):
        train(run, out, progress=stop)
    with pytest.raises(InputError, match=r"w.checkpoint: .*\(momentum: 0.9 -> 0.5; seed: 0 -> 1\); remove it"):
        train(run, out, replace(CONFIG, momentum=0.5, seed=1))
    out.with_suffix(".checkpoint").write_bytes(b"PK")
    with pytest.raises(InputError, match="damaged"):
        train(run, out)


def test_ctrl_c_is_not_swallowed(run, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "w.safetensors", progress=stop)


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_saves_its_step_and_goes_on_to_the_same_bits(asked, run, tmp_path):
    config = replace(CONFIG, checkpoint_every=100)
    outs = [tmp_path / f"{name}.safetensors" for name in ("whole", "cut")]
    train(run, outs[0], config)
    with stopped(asked):
        train(run, outs[1], config, progress=asking_to_stop(asked, at=3))
    assert torch.load(tmp_path / "cut.checkpoint", weights_only=True)["global_step"] == 3
    train(run, outs[1], config)
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_a_killed_training_goes_on_to_the_same_bits(manifest, tmp_path, monkeypatch):
    """On shards of `generate`; the checkpoint of the last step, which stays here, holds all that was learned."""
    from synthlong_cli.main import main

    shards = SynthesisConfig(box=32, painter="ellipsoid", artifacts="none", around_events=0.5, with_new_lesions=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        generate(manifest, tmp_path / "pairs", pairs=12, seed=3, config=shards, workers=1)
    toml = "".join(f"{k} = {list(v) if k == 'widths' else json.dumps(v)}\n" for k, v in (TINY | {"steps": 49}).items())
    (tmp_path / "tiny.toml").write_text(toml)
    options = ["--config", tmp_path / "tiny.toml", "--threads", 1, "--no-tensorboard"]
    whole, cut = (
        ["train", "ohem", tmp_path / "pairs", "-o", tmp_path / f"{n}.safetensors", *options] for n in ("whole", "cut")
    )
    with started(*cut) as process:
        wait_for((tmp_path / "cut.checkpoint").exists, process)
        process.kill()
    made = torch.load(tmp_path / "cut.checkpoint", weights_only=True)
    assert made["global_step"] < 49
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    for arguments in (cut, whole):
        assert main([str(word) for word in arguments]) == 0
    cut, whole = (torch.load(tmp_path / f"{name}.checkpoint", weights_only=True) for name in ("cut", "whole"))
    assert whole["global_step"] == cut["global_step"] == 49
    assert not torch.equal(made["state_dict"]["average.head.weight"], cut["state_dict"]["average.head.weight"])
    assert whole["state_dict"].keys() == cut["state_dict"].keys()
    assert all(torch.equal(whole["state_dict"][name], cut["state_dict"][name]) for name in whole["state_dict"])
    assert whole["ohem"]["curve"] == cut["ohem"]["curve"]
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "cut.safetensors").read_bytes()


def test_options_overrule_the_file(tmp_path, monkeypatch):
    from synthlong_cli.main import main

    seen = []
    monkeypatch.setattr(ohem, "train_ohem", lambda *_, **options: seen.append(options) or {"best": {}})
    (tmp_path / "c.toml").write_text("momentum = 0.5\nsteps = 7\n")
    words = ["train", "ohem", str(tmp_path), "-o", "w.safetensors", "--config", str(tmp_path / "c.toml")]
    for more in ([], ["--momentum", "0.99"], ["--oversample", "0.1", "--seed", "3"]):
        assert main([*words, *more]) == 0
    assert [o["config"].momentum for o in seen] == [0.5, 0.99, 0.5]
    assert [o["config"].mining for o in seen] == [True, True, False]
    assert (seen[2]["config"].positive_share, seen[2]["config"].steps, seen[2]["config"].seed) == (0.1, 7, 3)
    assert seen[2]["card"]["command"].endswith("-o w.safetensors --config c.toml --seed 3 --oversample 0.1")
    assert main([*words, "--momentum", "0.5", "--oversample", "0.1"]) == 2


def test_without_lightning_the_extra_is_named(monkeypatch, tmp_path, capsys):
    from synthlong_cli.main import main

    monkeypatch.setitem(sys.modules, "lightning", None)
    for name in ("ohem", "loop"):
        monkeypatch.delitem(sys.modules, f"synthlong.training.{name}", raising=False)
        monkeypatch.delattr(f"synthlong.training.{name}", raising=False)
    assert main(["train", "ohem", str(tmp_path), "-o", "w.safetensors"]) == 2
    assert 'pip install "synthlong[train]"' in capsys.readouterr().err
