"""What all transforms share, over all ten of them."""

import copy
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st

import synthlong.artifacts as artifacts
from synthlong.artifacts.base import axial_axis, softened, spacing_of
from synthlong.artifacts.ranges import Range, check_number, check_triple

RANDOM = [getattr(artifacts, name) for name in artifacts.__all__ if name.startswith("Random")]
RANDOM.remove(artifacts.RandomArtifact)
KERNELS = [r.final.kernel for r in RANDOM]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def always(cls, **kwargs):
    """A transform that changes the image whatever it draws."""
    extra = {
        artifacts.RandomAcquisition: {"preset": "kamraoui", "count": 9},
        artifacts.RandomKSpaceMotion: {"movements": 6},
    }
    return cls(**extra.get(cls, {}), **kwargs)


def image(*shape, seed=0):
    """Smooth positive voxels."""
    noise = np.random.default_rng(seed).random(shape).astype(np.float32)
    return torch.from_numpy(noise) + 0.5


def subject():
    affine = np.diag([-1.0, 1.0, 2.0, 1.0])
    return tio.Subject(
        t1=tio.ScalarImage(tensor=image(1, 9, 8, 7), affine=affine),
        flair=tio.ScalarImage(tensor=image(2, 9, 8, 7, seed=1), affine=affine),
        lesions=tio.LabelMap(tensor=(image(1, 9, 8, 7) > 1).to(torch.uint8), affine=affine),
        age=40,
    )


def snapshot(subject):
    return {name: i.data.clone() for name, i in subject.get_images_dict(intensity_only=False).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_there_are_nine_and_the_mixture():
    assert len(RANDOM) == 10
    assert {r.__name__ for r in RANDOM} == {"Random" + r.final.__name__ for r in RANDOM}


def test_no_name_collides_with_torchio():
    """History replays by bare class name."""
    for cls in (*RANDOM, *(r.final for r in RANDOM)):
        assert not hasattr(tio.transforms, cls.__name__)
        assert not hasattr(tio, cls.__name__)


@pytest.mark.parametrize("cls", RANDOM)
def test_subject(cls):
    source = subject()
    before = snapshot(source)
    result = always(cls)(source)
    assert same(snapshot(source), before), "input changed"
    assert not source.applied_transforms
    assert isinstance(result, tio.Subject)
    assert result.age == 40
    assert torch.equal(result.lesions.data, before["lesions"])
    assert result.lesions.data.data_ptr() != source.lesions.data.data_ptr()
    for name in ("t1", "flair"):
        assert not torch.equal(result[name].data, before[name]), name
        assert result[name].data.shape == before[name].shape
        assert np.array_equal(result[name].affine, source[name].affine)


@pytest.mark.parametrize("cls", RANDOM)
def test_history_is_json_and_replays_bit_for_bit(cls):
    source = subject()
    result = always(cls)(source)
    (entry,) = result.applied_transforms
    name, arguments = json.loads(json.dumps(entry))
    again = getattr(artifacts, name)(**arguments)(source)
    assert same(snapshot(again), snapshot(result))
    composed = result.get_composed_history()(source)
    assert same(snapshot(composed), snapshot(result))
    assert composed.applied_transforms == result.applied_transforms


@pytest.mark.parametrize("cls", RANDOM)
def test_every_kind_of_input_gives_the_same_voxels(cls):
    transform = always(cls, seed=3)
    x = image(1, 9, 8, 7)
    want = transform(x)
    assert isinstance(want, torch.Tensor)
    assert not torch.equal(want, x)
    array = transform(x.numpy())
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    assert torch.equal(torch.from_numpy(array), want)
    assert torch.equal(transform(x[0]), want[0])
    picture = transform(tio.ScalarImage(tensor=x))
    assert isinstance(picture, tio.ScalarImage)
    assert torch.equal(picture.data, want)
    assert torch.equal(transform(tio.Subject(a=tio.ScalarImage(tensor=x))).a.data, want)
    named = transform({"a": x, "mask": x.to(torch.uint8), "recipe": "{}"})
    assert torch.equal(named["a"], want)
    assert named["mask"] is not None
    assert named["recipe"] == "{}"
    sitk = tio.ScalarImage(tensor=x).as_sitk()
    assert torch.equal(tio.ScalarImage.from_sitk(transform(sitk)).data, want)


@pytest.mark.parametrize("cls", RANDOM)
def test_seeds(cls):
    transform, x = always(cls), image(1, 9, 8, 7)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = transform(x), transform(x)
    torch.set_rng_state(state)
    assert torch.equal(transform(x), first)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    torch.randint(2**63 - 1, (1,))
    assert torch.equal(transform(x), second), "a call takes one integer from torch's generator"
    fixed = always(cls, seed=1)
    state = torch.get_rng_state()
    assert torch.equal(fixed(x), fixed(x))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("cls", RANDOM)
def test_pickle_and_copy(cls):
    transform, x = always(cls, seed=2), image(1, 9, 8, 7)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(x), transform(x))
    assert torch.equal(copy.deepcopy(transform)(x), transform(x))


@pytest.mark.parametrize("cls", RANDOM)
def test_bad_images_are_refused_by_name(cls):
    transform = always(cls)
    bad = image(1, 4, 4, 4)
    bad[0, 1, 2, 3] = float("nan")
    bad[0, 1, 1, 1] = float("inf")
    with pytest.raises(ValueError, match=r"image 'flair': .*2 NaN or infinite voxels"):
        transform({"flair": bad})
    with pytest.raises(ValueError, match="int16 voxels"):
        transform(torch.ones(1, 4, 4, 4, dtype=torch.int16))
    with pytest.raises(ValueError, match="with voxels"):
        transform(torch.ones(1, 0, 4, 4))
    with pytest.raises(ValueError, match=r"\(C, I, J, K\)"):
        transform(torch.ones(1, 1, 4, 4, 4))


@pytest.mark.parametrize("cls", RANDOM)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 1), (2, 1, 3), (3, 2, 1, 4)])
def test_tiny_images(cls, shape):
    x = image(*shape)
    for seed in range(8):
        y = always(cls, seed=seed)(x)
        assert y.shape == x.shape
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("cls", RANDOM)
def test_one_slice(cls):
    """A 2-D image is a single slice of a volume."""
    x = image(9, 8)
    params = always(cls).draw_params(np.random.default_rng(4))
    arguments = cls.final.on_grid(params, np.eye(4))
    kernel = cls.final.kernel
    assert torch.equal(kernel(x, **arguments), kernel(x[..., None], **arguments)[..., 0])


@pytest.mark.parametrize("cls", RANDOM)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(cls, dtype):
    transform, x = always(cls, seed=1), image(1, 9, 8, 7).to(dtype)
    result = transform(x)
    assert result.dtype == dtype
    assert torch.equal(result, transform(x.float()).to(dtype))


def test_p():
    x = image(1, 6, 5, 4)
    assert artifacts.RandomGaussianBlur(p=0)(x) is x
    torch.manual_seed(0)
    half = artifacts.RandomGaussianBlur(p=0.5)
    changed = sum(half(x) is not x for _ in range(400))
    assert 150 < changed < 250
    twin = artifacts.GaussianBlur(1.0, p=0.5)
    assert 150 < sum(twin(x) is not x for _ in range(400)) < 250
    source = subject()
    assert artifacts.RandomGaussianBlur(p=0)(source).applied_transforms == []


def test_include_exclude_keep_and_label_keys():
    source = subject()
    result = artifacts.RandomGaussianBlur(include=["t1"])(source)
    assert torch.equal(result.flair.data, source.flair.data)
    assert not torch.equal(result.t1.data, source.t1.data)
    replayed = result.get_composed_history()(source)
    assert torch.equal(replayed.t1.data, result.t1.data)
    assert torch.equal(replayed.flair.data, source.flair.data)
    result = artifacts.RandomGaussianBlur(exclude=("t1",), keep={"flair": "clean"})(source)
    assert torch.equal(result.t1.data, source.t1.data)
    assert torch.equal(result.clean.data, source.flair.data)
    plain = {"a": image(1, 6, 5, 4), "b": image(1, 6, 5, 4, seed=1), "mask": image(1, 6, 5, 4).round()}
    result = artifacts.RandomGaussianBlur(exclude=["b"], label_keys=["mask"])(plain)
    assert result["b"] is plain["b"]
    assert result["mask"] is plain["mask"]
    assert not torch.equal(result["a"], plain["a"])
    assert artifacts.RandomGaussianBlur(include=["none"])(source).applied_transforms == []


def test_labels_in_a_dict_are_not_changed_in_silence():
    """`torchio.Compose` keeps its `include` to itself when it is called with a dict."""
    both = {"image": image(1, 8, 8, 8), "label": (image(1, 8, 8, 8) > 1).float()}
    transform = artifacts.RandomGaussianBlur(std=(1, 1))
    with pytest.raises(ValueError, match=r"'label' would be changed, too"):
        artifacts.GaussianBlur(std=1, exclude=["lab"])(both)
    with pytest.raises(ValueError, match=r"'label' would be changed, too; name the images: include=\['image'\]"):
        tio.Compose([transform], include=["image"])(both)
    for choice in ({"include": ["image"]}, {"exclude": ["label"]}, {"label_keys": ["label"]}):
        result = artifacts.RandomGaussianBlur(std=(1, 1), **choice)(both)
        assert torch.equal(result["label"], both["label"])
        assert not torch.equal(result["image"], both["image"])


@pytest.mark.parametrize("cls", RANDOM)
def test_scans_of_whole_numbers(cls, tmp_path):
    """As scanners write them: TorchIO leaves them int16."""
    voxels = (1000 * image(1, 9, 8, 7)).to(torch.int16)
    tio.ScalarImage(tensor=voxels).save(tmp_path / "flair.nii.gz")
    scan = tio.ScalarImage(tmp_path / "flair.nii.gz")
    assert scan.data.dtype == torch.int16
    transform = always(cls, seed=4)
    wanted = transform(tio.ScalarImage(tensor=voxels.float(), affine=scan.affine)).data
    assert torch.equal(transform(scan).data, wanted)
    changed = transform(tio.Subject(flair=scan))
    assert torch.equal(changed.flair.data, wanted)
    assert torch.equal(changed.get_composed_history()(tio.Subject(flair=scan)).flair.data, wanted)


def test_a_range_may_be_an_array():
    blur = artifacts.RandomGaussianBlur(std=np.array([0.5, 1.0]))
    assert 0.5 <= blur.draw_params(np.random.default_rng(0))["std"] <= 1
    assert artifacts.RandomKSpaceGhosting(axes=np.array([0, 2])).axes == (0, 2)
    with pytest.raises(ValueError, match=r"std = \[1\]: must be a number"):
        artifacts.RandomGaussianBlur(std=[[1], [1, 2]])
    with pytest.raises(ValueError, match=r"std = array\(\[1., 2., 3.\]\): must be a number or a range"):
        artifacts.RandomGaussianBlur(std=np.array([1.0, 2.0, 3.0]))


def test_a_dict_without_images_is_no_silent_pass():
    with pytest.raises(ValueError, match=r"no entry of the dict \['image'\]"):
        artifacts.RandomGaussianBlur()({"image": torch.ones(1, 8, 8)})


def test_voxels_shared_by_images_are_not_shared_with_the_result():
    x = image(1, 8, 8, 8)
    before = x.clone()
    both = tio.Subject(baseline=tio.ScalarImage(tensor=x), followup=tio.ScalarImage(tensor=x), plain=x)
    result = artifacts.RandomGaussianBlur(include=["followup"])(both)
    result.baseline.data.zero_()
    result["plain"].zero_()
    assert torch.equal(x, before)


def test_an_image_on_disk_is_not_loaded_into_the_callers_subject(bundled):
    source = tio.Subject(flair=tio.ScalarImage(bundled("cs07")[0]))
    result = artifacts.RandomSliceThickness()(source)
    assert not source.flair._loaded
    assert result.flair._loaded
    assert not torch.equal(result.flair.data, tio.ScalarImage(bundled("cs07")[0]).data)


def test_names_that_come_only_once():
    transform = artifacts.RandomGaussianBlur(include=(name for name in ["t1"]))
    first, second = transform(subject()), transform(subject())
    assert not torch.equal(second.t1.data, subject().t1.data)
    assert same(snapshot(first.get_composed_history()(subject())), snapshot(first))
    with pytest.raises(ValueError, match=r"no entry of the dict \['image'\] is an image named in \['imge'\]"):
        artifacts.RandomGaussianBlur(include=["imge"])({"image": image(1, 8, 8, 8)})


def test_arrays_of_the_other_byte_order():
    x = image(1, 8, 8, 8).numpy()
    transform = artifacts.RandomGaussianBlur(seed=1)
    assert np.array_equal(transform(x.astype(x.dtype.newbyteorder())), transform(x))


def test_history_shares_nothing_with_the_twin():
    twin = artifacts.Acquisition([("GaussianBlur", {"std": np.float32(1)}), ("SliceThickness", {"size": 3})])
    result = twin(subject())
    ((_, arguments),) = result.applied_transforms
    assert json.loads(json.dumps(arguments)) == arguments
    arguments["steps"].clear()
    assert len(twin.steps) == 2


def test_copy_false_changes_the_subject_but_not_its_replay():
    source, x = subject(), subject()
    result = artifacts.RandomGaussianBlur(copy=False)(source)
    assert result is source
    ((_, arguments),) = result.applied_transforms
    assert arguments["copy"] is True
    before = snapshot(x)
    artifacts.GaussianBlur(**arguments)(x)
    assert same(snapshot(x), before)


def params_of(result):
    ((_, arguments),) = result.applied_transforms
    return arguments


def test_independent_shared_correlated():
    pair = tio.Subject(a=tio.ScalarImage(tensor=image(1, 6, 6, 6)), b=tio.ScalarImage(tensor=image(1, 6, 6, 6)))
    std = params_of(artifacts.RandomGaussianNoise()(pair))["std"]
    assert std["a"] != std["b"]
    shared = artifacts.RandomGaussianNoise(shared=True)(pair)
    assert isinstance(params_of(shared)["std"], float)
    assert torch.equal(shared.a.data, shared.b.data), "the same noise"
    scanner = artifacts.RandomGaussianNoise(correlation=1)(pair)
    assert params_of(scanner)["std"]["a"] == params_of(scanner)["std"]["b"]
    assert not torch.equal(scanner.a.data, scanner.b.data), "noise is never the same twice"


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_correlation_is_what_it_says(correlation):
    """Uniform marginals, and the rank correlation of a Gaussian copula: 6/pi asin(c/2)."""
    transform = artifacts.RandomGaussianBlur(std=(0, 1), correlation=correlation)
    torch.manual_seed(0)
    drawn = []
    for _ in range(1500):
        choose = transform._choose(["a", "b"])
        drawn.append([choose(name)["std"] for name in "ab"])
    drawn = np.array(drawn)
    assert np.abs(drawn.mean(0) - 0.5).max() < 0.03
    assert np.abs(drawn.std(0) - 12**-0.5).max() < 0.02
    want = 6 / np.pi * np.arcsin(correlation / 2)
    assert abs(np.corrcoef(drawn.T)[0, 1] - want) < 0.08


@pytest.mark.parametrize("correlation", [0.5, 0.9])
def test_a_mixture_is_correlated_where_both_images_have_an_artifact(correlation):
    """However many others either has: of those that both have, the rank correlation is that of one artifact."""
    transform = artifacts.RandomAcquisition("kamraoui", correlation=correlation)
    torch.manual_seed(0)
    drawn = []
    for _ in range(4000):
        choose = transform._choose(["a", "b"])
        one, other = (dict(choose(name)["steps"]).get("GaussianNoise") for name in "ab")
        drawn += [(one["std"], other["std"])] if one and other else []
    assert len(drawn) > 250
    want = 6 / np.pi * np.arcsin(correlation / 2)
    assert abs(np.corrcoef(np.array(drawn).T)[0, 1] - want) < 0.12


@pytest.mark.parametrize("cls", RANDOM)
def test_autocast_and_gradients_do_not_matter(cls):
    transform, x = always(cls, seed=1), image(1, 9, 8, 7)
    want = transform(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transform(x), want)
    result = transform(x.requires_grad_())
    assert torch.equal(result, want)
    assert not result.requires_grad


def cut_products(how):
    """Let this process multiply float32 matrices in bf16, in the older way of torch or the newer one."""
    if how == "older":
        torch.set_float32_matmul_precision("medium")
    elif hasattr(torch.backends.mkldnn, "matmul"):
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    else:
        pytest.skip("this torch has the older way only")


@pytest.mark.parametrize("how", ["older", "newer"])
@pytest.mark.parametrize("cls", RANDOM)
def test_the_precision_of_matrix_products_does_not_matter(cls, how, request):
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    transform, x = always(cls, seed=1), image(1, 40, 40, 40)
    want = transform(x)
    cut_products(how)
    coarse = x[0, 0] @ x[0, 1]
    assert torch.equal(transform(x), want)
    assert torch.equal(x[0, 0] @ x[0, 1], coarse), "the process keeps its setting"


def test_a_process_forked_in_the_middle_of_a_product_does_not_wait_for_ever():
    program = """
import os, sys, torch
from synthlong.artifacts import kspace, kspace_ghosting
with kspace._alone:
    child = os.fork()
    if child == 0:
        kspace_ghosting(torch.rand(1, 12, 12, 12), ghosts=3, axis=0, intensity=1.0)
        os._exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=60, check=False).returncode == 7


def test_without_a_place_for_numbas_cache_kernels_are_compiled_anew():
    program = """
from numba.core.caching import CacheImpl
CacheImpl._locator_classes = []  # as in a container: neither the package nor a home can be written
import numba, torch
try:
    numba.njit(cache=True)(lambda x: x)
except RuntimeError:
    from synthlong.artifacts import gaussian_blur
    print(gaussian_blur(torch.ones(1, 5, 5, 5), std=1.0).mean().item())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1)


def test_arrays_become_lists_in_history():
    coefficients = np.linspace(-0.1, 0.1, 20)
    result = artifacts.PolynomialBiasField(coefficients)(subject())
    name, arguments = json.loads(json.dumps(result.applied_transforms[0]))
    assert arguments["coefficients"] == coefficients.tolist()
    assert same(snapshot(getattr(artifacts, name)(**arguments)(subject())), snapshot(result))


def test_twin_with_parameters_by_name():
    source = subject()
    result = artifacts.GaussianBlur({"t1": 0.0, "flair": 1.0})(source)
    assert torch.equal(result.t1.data, source.t1.data)
    assert not torch.equal(result.flair.data, source.flair.data)
    with pytest.raises(ValueError, match=r"\['t1'\], none for 'flair'"):
        artifacts.GaussianBlur({"t1": 1.0})(source)


def test_inside_torchio():
    source = subject()
    chain = tio.Compose(
        [tio.RandomFlip(axes=0, flip_probability=1), artifacts.RandomGaussianNoise(), tio.RandomGamma()]
    )
    result = chain(source)
    assert [name for name, _ in result.applied_transforms] == ["Flip", "GaussianNoise", "Gamma"]
    replayed = result.get_composed_history()(source)
    assert same(snapshot(replayed), snapshot(result))
    one_of = tio.OneOf([artifacts.RandomGaussianBlur(), artifacts.RandomKSpaceMotion()])
    assert len(one_of(source).applied_transforms) == 1


def test_a_tensor_of_another_class_has_no_gradient():
    MetaTensor = pytest.importorskip("monai.data").MetaTensor
    x = MetaTensor(image(1, 9, 8, 7)).requires_grad_(True)
    assert not artifacts.GaussianBlur(std=1)(x).requires_grad
    assert type(artifacts.acquire(x, steps=[("GaussianBlur", {"std": 0})])) is torch.Tensor


def test_monai_keeps_its_meta():
    monai = pytest.importorskip("monai.transforms")
    from monai.data import MetaTensor

    affine = torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64))
    x = MetaTensor(image(1, 9, 8, 7), affine=affine, meta={"name": "scan"})
    chain = monai.Compose([artifacts.RandomSliceThickness(size=3), artifacts.RandomGaussianNoise()])
    result = chain({"image": x, "label": (x > 1).to(torch.uint8)})
    assert isinstance(result["image"], MetaTensor)
    assert result["image"].meta["name"] == "scan"
    assert torch.equal(result["image"].affine, affine)
    assert not torch.equal(result["image"].as_tensor(), x.as_tensor())
    sagittal = MetaTensor(image(1, 9, 8, 7), affine=torch.tensor(np.eye(4)[[1, 2, 0, 3]]))
    blurred = artifacts.RandomSliceThickness(size=3)({"image": sagittal})["image"]
    want = artifacts.slice_thickness(sagittal.as_tensor(), size=3, axis=0)
    assert torch.equal(blurred.as_tensor(), want)


class Scans(torch.utils.data.Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 6

    def __getitem__(self, n):
        return self.transform(image(1, 8, 8, 8))


def test_workers():
    """Seeds of a DataLoader govern what its workers draw; kernels used before a fork still run after it."""
    transform = artifacts.RandomAcquisition("kamraoui", count=3)
    transform(image(1, 128, 128, 70))
    batches = []
    for start in ("fork", "fork", "spawn"):
        torch.manual_seed(11)
        loader = torch.utils.data.DataLoader(
            Scans(transform), batch_size=None, num_workers=2, multiprocessing_context=start
        )
        batches.append(torch.stack(list(loader)))
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])
    assert len({tuple(x.ravel().tolist()) for x in batches[0]}) == 6


def test_kernels_just_compiled_and_from_the_cache_give_the_same_bits(tmp_path):
    """Else the first process on a machine would make other pairs than the next."""
    program = """
import hashlib, torch
import synthlong.artifacts as artifacts
torch.set_num_threads(1)
torch.manual_seed(0)
x, bits = torch.rand(1, 23, 24, 25), hashlib.sha256()
for name in artifacts.__all__:
    if name.startswith("Random") and name not in ("RandomArtifact", "RandomAcquisition"):
        for seed in range(4):
            bits.update(getattr(artifacts, name)(seed=seed)(x).numpy().tobytes())
print(bits.hexdigest())
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", program]
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    assert len(runs[0].stdout.strip()) == 64
    assert runs[0].stdout == runs[1].stdout


def test_axial_axis_and_spacing():
    assert axial_axis(np.eye(4)) == 2
    assert axial_axis(np.eye(4)[[1, 2, 0, 3]]) == 0
    assert axial_axis(np.diag([5.0, 1.0, -1.0, 1.0])) == 2
    oblique = np.eye(4)
    oblique[:3, :3] = [[1, 0, 0], [0, 0.9, -0.4], [0, 0.4, 0.9]]
    assert axial_axis(oblique) == 2
    assert spacing_of(np.diag([2.0, -3.0, 0.5, 1.0])) == (2.0, 3.0, 0.5)


def test_softened():
    params = {"std": [1.0, 2.0], "size": 4, "none": None, "other": 3}
    half = softened(params, {"std": 0.0, "size": 1, "none": 0}, 0.5)
    assert half == {"std": [0.5, 1.0], "size": 2, "none": None, "other": 3}
    assert softened(params, {"std": 0.0}, 1) == params


@given(st.floats(-100, 100), st.floats(0, 100), st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_range_draws_within(low, width, seed):
    values = [Range.of("v", (low, low + width)).draw(np.random.default_rng(seed + n)) for n in range(5)]
    assert all(low <= v <= low + width for v in values)
    assert json.loads(json.dumps(values)) == values


def test_ranges():
    assert Range.of("v", 5) == Range(0, 5)
    assert Range.of("v", 5, symmetric=True) == Range(-5, 5)
    assert Range.of("v", 3, around=1) == Range(1, 3)
    assert Range.of("v", 3, whole=True) == Range(3, 3, True)
    rng = np.random.default_rng(0)
    assert {Range.of("v", (2, 4), whole=True).draw(rng) for _ in range(100)} == {2, 3, 4}
    assert len({Range.of("v", (1e-8, 5e-7)).draw(rng) for _ in range(20)}) == 20
    for bad in ((2, 1), (1, 2, 3), "1", None, True, float("nan"), (0, float("inf"))):
        with pytest.raises(ValueError, match="std = "):
            Range.of("std", bad)
    with pytest.raises(ValueError, match=r"size = 2.5: must be a whole number in \[1, 8\]"):
        check_number("size", 2.5, least=1, most=8, whole=True)
    assert check_number("seed", 2**63 - 1, least=0, most=2**63 - 1, whole=True) == 2**63 - 1
    assert check_number("size", np.float64(3), whole=True) == 3
    with pytest.raises(ValueError, match=r"v = -1: must be a number in \[0, 9\]"):
        check_triple("v", -1, least=0, most=9)
    with pytest.raises(ValueError, match="three"):
        check_triple("v", (1, 2))


def test_arguments_of_the_base_are_checked():
    with pytest.raises(ValueError, match=r"correlation = 2"):
        artifacts.RandomGaussianBlur(correlation=2)
    with pytest.raises(ValueError, match=r"seed = -1"):
        artifacts.RandomGaussianBlur(seed=-1)
    with pytest.raises(ValueError, match=r"std = -1"):
        artifacts.GaussianBlur(-1)
