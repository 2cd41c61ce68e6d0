import inspect
import json
import re
import signal
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from running import asking_to_stop, stopped
from synthlong_cli import fit as verb
from synthlong_cli.main import main

from synthlong import fitting
from synthlong.errors import ConfigError, InputError
from synthlong.fitting import FitConfig, fit, fit_on_cases
from synthlong.networks import UNetConfig
from synthlong.orientation import draw_orientation
from synthlong.painting import LesionSampler
from synthlong.sampling import draw_variation, vary
from synthlong.weights import read_weights

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORK = UNetConfig(in_channels=3, out_channels=1, widths=(8, 16))
CONFIG = FitConfig(steps=6, sides=(16,), voxels=2 * 16**3, report_every=2, precision="float32")


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr(fitting, "_HELD_OUT_SAMPLES", 2)


@pytest.fixture
def train(small_case, tmp_path):
    def run(name, config=CONFIG, **options):
        sampler = LesionSampler([small_case])
        path = tmp_path / f"{name}.safetensors"
        wanted = {
            "task": "generator",
            "network": NETWORK,
            "training": sampler,
            "held_out": sampler,
            **options,
        }
        figures = fit(config, out=path, card={"licence": "CC0"}, **wanted)
        return path, figures

    return run


class StopError(Exception):
    """Ctrl-C in the middle."""


def stop_at(step):
    def progress(done, steps, loss):
        if done == step:
            raise StopError

    return progress


def test_a_short_fit(train):
    seen = []
    path, figures = train("w", progress=lambda *point: seen.append(point))
    assert [s[:2] for s in seen] == [(n, 6) for n in range(1, 7)]
    assert np.isfinite([s[2] for s in seen]).all()
    assert [p["step"] for p in figures["curve"]] == [2, 4, 6]
    assert all(np.isfinite(list(p.values())).all() for p in figures["curve"])
    network, _ = read_weights(path, task="generator")
    assert network.head.weight.any()
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["curve"] == figures["curve"]
    assert card["licence"] == "CC0"
    assert card["fit"]["seed"] == 0
    assert not path.with_suffix(".checkpoint").exists()


def test_same_seed_same_weights(train):
    (a, _), (b, _), (c, _) = train("a"), train("b"), train("c", replace(CONFIG, seed=1))
    assert a.read_bytes() == b.read_bytes()
    assert a.read_bytes() != c.read_bytes()


def test_an_interrupted_fit_goes_on_to_the_same_weights(train, monkeypatch):
    whole, figures = train("whole")
    monkeypatch.setattr(fitting, "_CHECKPOINT_EVERY_S", 0)
    for step in (3, 5):
        with pytest.raises(StopError):
            train("broken", progress=stop_at(step))
    seen = []
    path, resumed = train("broken", progress=lambda done, *_: seen.append(done))
    assert seen == [5, 6]
    assert path.read_bytes() == whole.read_bytes()
    assert resumed["curve"] == figures["curve"]
    assert sorted(p.name for p in path.parent.glob("broken*")) == ["broken.json", "broken.safetensors"]


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"config": replace(CONFIG, seed=9)}, "seed"),
        ({"config": replace(CONFIG, sides=(16, 20))}, "sides"),
        ({"task": "inpainter"}, "task"),
        ({"network": UNetConfig(3, 1, (8, 8))}, "network.widths"),
        ({"about": {"held_out": "cs19"}}, "held_out"),
    ],
)
def test_a_checkpoint_of_another_fit_is_refused(train, monkeypatch, changed, name):
    monkeypatch.setattr(fitting, "_CHECKPOINT_EVERY_S", 0)
    with pytest.raises(StopError):
        train("w", progress=stop_at(4))
    with pytest.raises(InputError, match=rf"of another training \({name}: "):
        train("w", **changed)


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_fit_saves_its_step_and_goes_on_to_the_same_bits(asked, train, tmp_path):
    with stopped(asked):
        train("w", progress=asking_to_stop(asked, at=3))
    assert torch.load(tmp_path / "w.checkpoint", weights_only=True)["fit"]["step"] == 3
    (path, figures), (other, whole) = train("w"), train("whole")
    assert figures["curve"] == whole["curve"]
    assert path.read_bytes() == other.read_bytes()


def test_what_is_finished_stays(train, tmp_path):
    path, figures = train("w")
    files = {p: p.read_bytes() for p in (path, path.with_suffix(".json"))}
    assert train("w", training=None)[1] == figures
    with pytest.raises(InputError, match=r"w.safetensors: is there already, of another training \(seed: 0 -> 9\)"):
        train("w", replace(CONFIG, seed=9))
    assert files == {p: p.read_bytes() for p in files}
    (tmp_path / "v.json").write_text("[]")
    with pytest.raises(InputError, match=r"v.json: is there already, and this training did not write it"):
        train("v", training=None)


@pytest.mark.parametrize("keep", [0, 50, 2000])
def test_a_damaged_checkpoint_is_refused(train, monkeypatch, tmp_path, keep):
    monkeypatch.setattr(fitting, "_CHECKPOINT_EVERY_S", 0)
    with pytest.raises(StopError):
        train("w", progress=stop_at(4))
    path = tmp_path / "w.checkpoint"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"w\.checkpoint: the checkpoint is damaged"):
        train("w")


def test_a_loss_that_is_not_finite_stops(train, monkeypatch):
    monkeypatch.setattr(fitting, "_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(InputError, match="not finite at step 0"):
        train("w")


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"sides": ()},
        {"sides": (12,)},
        {"sides": (18,)},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": 1e38},
        {"report_every": 0},
        {"voxels": 0},
        {"seed": -1},
        {"precision": "fp16"},
        {"loss": "l3"},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FitConfig(**wrong)


@pytest.mark.parametrize("task", ["inpainter", "generator"])
def test_fit_on_cases_keeps_a_patient_out(small_case, tmp_path, monkeypatch, task):
    lesions = np.zeros_like(small_case.lesions)
    lesions[8:11, 20, 20] = lesions[9, 19:22, 20] = 1
    cases = [replace(small_case, id=i, lesions=lesions) for i in ("a_ses-1", "a_ses-2", "b")]
    monkeypatch.setattr("synthlong.inpainting.NETWORK", NETWORK)
    monkeypatch.setattr("synthlong.painting.NETWORK", NETWORK)
    out = tmp_path / "w.safetensors"
    config = replace(CONFIG, steps=1)
    fit_on_cases(task, cases, out, config=config, hold_out="b", card={})
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["patients"] == ["a", "b"]
    assert card["held_out"] == "b"
    assert set(card["curve"][0]) == {"step", "loss", "mae", "mae_first_guess", "bias"}
    with pytest.raises(ConfigError, match="no such patient; there are a, b"):
        fit_on_cases(task, cases, out, config=config, hold_out="a_ses-1", card={})
    with pytest.raises(ConfigError, match="no patient is left"):
        fit_on_cases(task, cases[:2], out, config=config, hold_out="a", card={})


def test_a_patient_without_lesions_cannot_be_held_out(small_case, tmp_path, monkeypatch):
    lesions = np.zeros_like(small_case.lesions)
    lesions[8:11, 20, 20] = lesions[9, 19:22, 20] = 1
    cases = [replace(small_case, id="a", lesions=lesions), replace(small_case, id="b", lesions=np.zeros_like(lesions))]
    monkeypatch.setattr("synthlong.painting.NETWORK", NETWORK)
    steps = []
    with pytest.raises(InputError, match="b: no lesions to learn from"):
        fit_on_cases(
            "generator",
            cases,
            tmp_path / "w.safetensors",
            config=CONFIG,
            hold_out="b",
            card={},
            progress=lambda step, *_: steps.append(step),
        )
    assert not steps


@pytest.fixture
def words(manifest, tmp_path, monkeypatch):
    """`fit generator` on the two cases of the manifest and one that is no scan, and what it would fit."""
    (tmp_path / "bad.nii.gz").write_bytes(b"no scan")
    folder, rows = manifest.parent, manifest.read_text().split()
    listed = [rows[0], *(f"{s},{folder / f},{folder / m}" for s, f, m in (row.split(",") for row in rows[1:]))]
    (tmp_path / "cases.csv").write_text("\n".join([*listed, "p3,bad.nii.gz,bad.nii.gz"]) + "\n")
    called = {}
    figures = {"curve": [{"step": 1}]}
    monkeypatch.setattr(
        fitting, "fit_on_cases", lambda task, cases, out, **kw: called.update(kw, cases=cases) or figures
    )
    return ["fit", "generator", str(tmp_path / "cases.csv"), "-o", str(tmp_path / "w.safetensors")], called


@pytest.mark.filterwarnings("ignore::synthlong.errors.InputWarning")
def test_a_bad_case_is_left_out(words, capsys):
    arguments, called = words
    assert main([*arguments, "--hold-out", "sub-cs19", "--precision", "float32", "--device", "cpu:0"]) == 1
    assert [case.id for case in called["cases"]] == ["cs07", "cs19"]
    assert called["hold_out"] == "cs19"
    assert called["config"] == FitConfig(precision="float32", device="cpu:0")
    said = "--steps 2000 --learning-rate 0.0001 --sides 64 --seed 0 --hold-out cs19 --device cpu:0 --precision float32"
    assert called["card"]["command"].endswith(said)
    assert "left out: p3: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--hold-out", "p9"], 2, "--hold-out p9: no such patient; there are cs07, cs19, p3"),
        (["--device", "cuda:99"], 2, "cuda:99"),
        (["--patches", "0"], 2, "'--patches'"),
        (["-o", "/proc/none/w.safetensors"], 3, "proc/none"),
    ],
)
def test_what_is_wrong_is_said_before_cases_are_read(words, monkeypatch, capsys, more, code, said):
    monkeypatch.setattr("synthlong.manifest.CaseFiles.read", lambda self: pytest.fail("read"))
    assert main([*words[0], *more]) == code
    assert said in capsys.readouterr().err


def test_no_usable_case(words, tmp_path, capsys):
    (tmp_path / "cases.csv").write_text("subject,flair,mask\np3,bad.nii.gz,bad.nii.gz\n")
    assert main(words[0]) == 1
    assert "no case can be used; see `synthlong check`" in capsys.readouterr().err


def test_variations_keep_the_background():
    rng = np.random.default_rng(0)
    x = rng.uniform(0.2, 1.8, (12, 12, 12)).astype(np.float32)
    x[:4] = 0
    before = x.copy()
    for _ in range(20):
        look = draw_variation(rng)
        y = vary(x, look)
        assert y.dtype == np.float32
        assert np.array_equal(y > 0, x > 0)
        assert np.array_equal(y, vary(x, look))
    assert np.array_equal(x, before)
    assert np.allclose(vary(x, type(look)()), x, atol=1e-6)


def test_orientations_of_samples():
    x = np.arange(27).reshape(3, 3, 3)
    seen = {draw_orientation(np.random.default_rng(n), "all").apply(x).tobytes() for n in range(600)}
    assert len(seen) == 48


def test_a_repository_around_an_installed_package_is_not_its_own(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)

    (tmp_path / "fit.py").touch()
    git("init")
    monkeypatch.setattr(verb, "__file__", str(tmp_path / "fit.py"))
    assert verb.commit() is None
    git("add", "fit.py")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "a")
    assert re.fullmatch("[0-9a-f]{40}", verb.commit())
    (tmp_path / "fit.py").write_text("changed")
    assert re.fullmatch("[0-9a-f]{40}-dirty", verb.commit())


def test_the_help_has_the_defaults_of_the_library():
    texts = {name: option.default.help for name, option in inspect.signature(verb.fit).parameters.items()}
    said = {name: found[1] for name, text in texts.items() if (found := re.search(r"\[default: (.*)\]", text))}
    assert int(said.pop("patches")) * 32**3 == FitConfig.voxels
    assert (int(said.pop("sides")),) == FitConfig.sides
    assert float(said.pop("learning_rate")) == FitConfig.learning_rate
    assert said == {name: str(getattr(FitConfig, name)) for name in ("steps", "seed", "device", "precision", "loss")}
