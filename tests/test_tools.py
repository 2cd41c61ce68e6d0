"""Denoising and bias correction on phantoms whose truth is known, and what the tools say when they fail."""

import os

import numpy as np
import pytest
import torch

from synthlong.preparation import tools
from synthlong.preparation.registration import Image, register
from synthlong.preparation.tools import brain_mask, correct_bias, denoise, unheard
from synthlong.resampling import Grid


@pytest.fixture(scope="module")
def phantom():
    """A ball of two tissues, 1 x 1 x 2 mm; its brain, and the grid."""
    grid = Grid((44, 44, 22), np.diag([1.0, 1.0, 2.0, 1.0]))
    i, j, k = (np.indices(grid.shape) - np.array([22, 22, 11]).reshape(3, 1, 1, 1)) * np.array([1, 1, 2]).reshape(
        3, 1, 1, 1
    )
    radius = np.sqrt(i**2 + j**2 + k**2)
    return np.where(radius < 10, 120.0, np.where(radius < 19, 100.0, 0)).astype(np.float32), radius < 19, grid


def test_hd_bet_meets_no_denormals(phantom, monkeypatch):
    tiny, met = torch.tensor(2e-38), []

    def hd_bet(scan, *_, **__):
        met.append((tiny / 4).item())
        return scan, np.ones(scan.shape)

    monkeypatch.setattr(tools, "load_hd_bet", lambda: hd_bet)
    truth, _, grid = phantom
    assert brain_mask(truth, grid).all()
    assert met == [0]
    assert (tiny / 4).item() > 0


def test_noise_goes_and_edges_stay(phantom):
    truth, brain, grid = phantom
    noise = np.random.default_rng(1).normal(0, 5, (2, *truth.shape))
    noisy = np.hypot(truth + noise[0], noise[1]).astype(np.float32)
    clean = denoise(noisy, brain, grid)
    inner, outer = truth == 120, (truth == 100) & brain
    assert clean[inner].std() < 0.6 * noisy[inner].std()
    assert clean[inner].mean() - clean[outer].mean() == pytest.approx(20, abs=2)
    assert not clean[~brain].any()


def test_a_bias_field_is_found(phantom):
    truth, brain, grid = phantom
    field = np.exp(0.3 * (np.arange(44) - 22) / 22).reshape(-1, 1, 1)
    noise = np.random.default_rng(2).normal(0, 1, truth.shape)
    biased = ((truth + noise) * field).astype(np.float32)
    found = correct_bias(biased, brain, grid)

    def unevenness(x):
        return np.std((x / np.maximum(truth, 1))[brain]) / np.mean((x / np.maximum(truth, 1))[brain])

    assert unevenness(found) < 0.7 * unevenness(biased)


def test_what_ants_says_is_in_the_error_and_not_on_the_terminal(capfd):
    nothing = Image(np.zeros((16, 16, 16), np.float32), Grid((16, 16, 16), np.eye(4)))
    with pytest.raises(RuntimeError, match=r"^registration failed: .*Total Mass of the image was zero"):
        register(nothing, nothing, motion="Rigid")
    assert capfd.readouterr() == ("", "")


@unheard("work")
def fail(said, error):
    os.write(2, said)
    raise error


def test_the_terminal_is_given_back(capfd):
    for said, told in ((b"one\ntwo\n\n", "two"), (b"", "three")):
        with pytest.raises(RuntimeError, match=f"^work failed: {told}$"):
            fail(said, ValueError("three"))
    with pytest.raises(KeyboardInterrupt):
        fail(b"", KeyboardInterrupt)
    os.write(1, b"out")
    os.write(2, b"err")
    assert capfd.readouterr() == ("out", "err")
