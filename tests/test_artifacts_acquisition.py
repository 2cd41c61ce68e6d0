"""The mixture."""

from collections import Counter

import numpy as np
import pytest
import torch

from synthlong.artifacts import (
    GaussianBlur,
    GaussianNoise,
    RandomAcquisition,
    RandomGaussianBlur,
    RandomGaussianNoise,
    RandomKSpaceMotion,
    acquire,
    gaussian_blur,
    gaussian_noise,
)


def drawn(transform, n=2000):
    rng = np.random.default_rng(0)
    return [transform.draw_params(rng)["steps"] for _ in range(n)]


def test_presets():
    mild, full = drawn(RandomAcquisition()), drawn(RandomAcquisition("kamraoui"))
    assert abs(np.mean([not steps for steps in mild]) - 0.3) < 0.03
    assert Counter(len(s) for s in mild).keys() == {0, 1, 2}
    assert Counter(len(s) for s in full).keys() == {1, 2, 3}
    for runs in (mild, full):
        counts = Counter(name for steps in runs for name, _ in steps)
        assert len(counts) == 9
        assert min(counts.values()) > 0.8 * max(counts.values())
        assert all(len({name for name, _ in steps}) == len(steps) for steps in runs)
    std = [p["std"] for steps in mild for name, p in steps if name == "GaussianNoise"]
    assert 0.01 <= min(std) < 0.012
    assert 0.048 < max(std) <= 0.05
    std = [p["std"] for steps in full for name, p in steps if name == "GaussianNoise"]
    assert 0.02 <= min(std) < max(std) <= 0.1
    spikes = [p["intensity"] for steps in mild for name, p in steps if name == "KSpaceSpike"]
    assert 0.05 <= min(spikes) < 0.06
    assert 0.24 < max(spikes) <= 0.25


def test_clinical_scans_have_thick_slices():
    """60 % of them, axial ones, whatever else they have; without that, the draws of "mild"."""
    runs = drawn(RandomAcquisition("clinical"))
    thick = [(steps, p) for steps in runs for name, p in steps if p.get("prefilter")]
    assert abs(len(thick) / len(runs) - 0.6) < 0.03
    assert {p["axis"] for _, p in thick} == {"axial"}
    factors = [p["factor"] for _, p in thick]
    assert 2 <= min(factors) < 2.05
    assert 3.95 < max(factors) <= 4
    mixed = [steps for steps, _ in thick if len(steps) == 3]
    assert any(steps[0][0] == "KSpaceMotion" and steps[1][1].get("prefilter") for steps in mixed), "in order"
    assert any(steps[1][1].get("prefilter") and steps[2][0] == "UnsharpMask" for steps in mixed), "in order"
    own = RandomAcquisition("clinical", artifacts=[RandomGaussianNoise(), RandomKSpaceMotion()], count=2, untouched=0)
    orders = {tuple(name for name, _ in steps) for steps in drawn(own, 50)}
    assert {tuple(n for n in names if n != "AnisotropicDownsampling") for names in orders} == {
        tuple(artifact.final.__name__ for artifact in own.artifacts)
    }, "the user's order stays"
    assert drawn(RandomAcquisition("clinical", thick_slices=0), 50) == drawn(RandomAcquisition("mild"), 50)
    assert all(p["prefilter"] for (_, p), *_ in drawn(RandomAcquisition(thick_slices=1, untouched=1), 50))


def test_artifacts_come_in_the_order_of_a_scan():
    order = [
        *("KSpaceMotion", "PolynomialBiasField", "KSpaceGhosting", "SliceThickness", "AnisotropicDownsampling"),
        *("KSpaceSpike", "GaussianNoise", "GaussianBlur", "UnsharpMask"),
    ]
    for preset in ("kamraoui", "clinical"):
        for steps in drawn(RandomAcquisition(preset), 300):
            names = [name for name, _ in steps]
            assert names == sorted(names, key=order.index)


def test_severity_zero_is_the_identity():
    x = torch.rand(1, 6, 7, 8)
    assert drawn(RandomAcquisition("kamraoui", severity=0), 20) == [[]] * 20
    assert torch.equal(RandomAcquisition(severity=0)(x), x)


def test_steps_are_the_functions_in_order():
    x = torch.rand(9, 8, 7)
    steps = [["GaussianNoise", {"std": 0.1, "seed": 3}], ["GaussianBlur", {"std": 1.0}]]
    want = gaussian_blur(gaussian_noise(x, std=0.1, seed=3), std=1.0)
    assert torch.equal(acquire(x, steps=steps), want)
    half = acquire(x.half(), steps=steps)
    assert half.dtype == torch.float16
    assert torch.equal(half, acquire(x.half().float(), steps=steps).half()), "rounded once, in the end"


def test_no_step_gives_a_copy():
    x = torch.rand(9, 8, 7)
    before, same = x.clone(), acquire(x, steps=[])
    assert torch.equal(same, x)
    same += 1
    assert torch.equal(x, before)


def test_background():
    x = torch.rand(9, 8, 7)
    x[:3] = 0
    steps = [["GaussianNoise", {"std": 0.1, "seed": 3}]]
    assert acquire(x, steps=steps)[:3].any()
    clean = acquire(x, steps=steps, zero_background=True)
    assert not clean[:3].any()
    assert torch.equal(clean[3:], acquire(x, steps=steps)[3:])
    assert not RandomAcquisition("kamraoui", zero_background=True)(x)[:3].any()


@pytest.mark.parametrize(
    "step",
    [
        ["SliceThickness", {"size": 3, "axis": "axial"}],
        ["AnisotropicDownsampling", {"factor": 2.5, "axis": "axial", "prefilter": True}],
    ],
)
def test_axial_follows_the_affine(step):
    x, steps = torch.rand(9, 8, 7), [step]
    turned = np.eye(4)[[1, 2, 0, 3]]  # axis 0 runs up
    want = acquire(x.transpose(0, 2), steps=steps).transpose(0, 2)
    assert torch.allclose(acquire(x, steps=steps, affine=turned), want, atol=1e-6)


def test_own_choice_of_artifacts():
    transform = RandomAcquisition(
        artifacts=[RandomGaussianNoise(std=(1, 2)), RandomGaussianBlur()], untouched=0, count=2, severity=1
    )
    for steps in drawn(transform, 20):
        assert [name for name, _ in steps] == [GaussianNoise.__name__, GaussianBlur.__name__]
        assert 1 <= steps[0][1]["std"] <= 2
    assert {len(s) for s in drawn(RandomAcquisition("kamraoui", artifacts=[RandomGaussianBlur()]), 20)} == {1}


def test_bad_arguments():
    for arguments, problem in [
        ({"preset": "wild"}, "preset = 'wild'"),
        ({"severity": 2}, "severity = 2"),
        ({"untouched": -1}, "untouched = -1"),
        ({"thick_slices": 2}, "thick_slices = 2"),
        ({"count": 10}, "count = 10"),
        ({"artifacts": [GaussianBlur(1.0)]}, "none of"),
        ({"artifacts": [RandomGaussianBlur(p=0.5)]}, "p, include"),
        *(
            ({"artifacts": [RandomGaussianBlur(**own)]}, "RandomGaussianBlur has its own")
            for own in (
                {"seed": 1},
                {"include": ["flair"]},
                {"exclude": ["flair"]},
                {"shared": True},
                {"correlation": 0.5},
            )
        ),
    ]:
        with pytest.raises(ValueError, match=problem):
            RandomAcquisition(**arguments)
    with pytest.raises(ValueError, match="step 'Blur': must be one of KSpaceMotion"):
        acquire(torch.ones(2, 2, 2), steps=[("Blur", {})])
    for step in (("GaussianBlur",), ("GaussianBlur", None)):
        with pytest.raises(ValueError, match="must be a name and a dict of parameters"):
            acquire(torch.ones(2, 2, 2), steps=[step])
    with pytest.raises(ValueError, match=r"step \['GaussianBlur'\]: must be one of"):
        acquire(torch.ones(2, 2, 2), steps=[(["GaussianBlur"], {})])
    with pytest.raises(ValueError, match="step AnisotropicDownsampling: 'axis' is missing"):
        acquire(torch.ones(2, 2, 2), steps=[("AnisotropicDownsampling", {"factor": 2})])
    with pytest.raises(ValueError, match=r"step GaussianBlur: std = -1"):
        acquire(torch.ones(2, 2, 2), steps=[("GaussianBlur", {"std": -1})])
    with pytest.raises(ValueError, match=r"step GaussianBlur: .*unexpected"):
        acquire(torch.ones(2, 2, 2), steps=[("GaussianBlur", {"width": 1})])


def test_steps_that_change_nothing_give_the_image_in_double_precision_too():
    x = torch.rand(4, 4, 4, dtype=torch.float64)
    assert torch.equal(acquire(x, steps=[("GaussianBlur", {"std": 0})]), x)


def test_transforms_in_place_of_a_preset_are_told_where_they_go():
    with pytest.raises(ValueError, match="must be one of mild, kamraoui, clinical; transforms go in artifacts="):
        RandomAcquisition([RandomGaussianBlur()])
    assert len(RandomAcquisition(artifacts=RandomGaussianBlur()).artifacts) == 1
