import hashlib
import json
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from running import bytes_of

import synthlong
from synthlong.dataset.assets import asset_hashes
from synthlong.dataset.cases import CaseTask, prepare_case
from synthlong.dataset.run import generate
from synthlong.dataset.store import open_case
from synthlong.errors import InputWarning
from synthlong.healthy import stored_healthy, write_healthy
from synthlong.inpainting import Inpainter, heal
from synthlong.manifest import find_cases
from synthlong.networks import UNet, UNetConfig, default_precision, one_thread
from synthlong.synthesis import SynthesisConfig

STEM = "sub-a_space-MNI152"


def inpainter(**options):
    torch.manual_seed(0)
    network = UNet(UNetConfig(in_channels=3, out_channels=1, widths=(8, 16))).eval()
    torch.nn.init.normal_(network.head.weight, std=0.1)
    return Inpainter(network, **({"sha256": "none"} | options))


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


def read(folder):
    """The case of a folder, as `generate` reads it; what is wrong with its looks is no matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        (files,) = find_cases(folder)
        return files.read()


@pytest.fixture
def folder(tmp_path, small_case, write_volume):
    """The small case as a folder of prepared ones, with its healthy volume."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_volume(folder / f"{STEM}_FLAIR.nii.gz", small_case.flair, small_case.affine)
    write_volume(folder / f"{STEM}_desc-lesions_mask.nii.gz", small_case.lesions, small_case.affine)
    write_healthy(folder / f"{STEM}_desc-healthy_FLAIR.nii.gz", read(folder), inpainter())
    return folder


def test_what_is_stored_is_used_bit_for_bit(folder, monkeypatch):
    case = read(folder)
    expected = inpainter().fill(case.flair, case.lesions)
    assert not np.array_equal(expected, case.flair)
    monkeypatch.setattr(Inpainter, "fill", None)  # nobody asks for it
    healed = heal(case, inpainter())
    assert healed.healthy.dtype == np.float32
    assert healed.healthy.flags.c_contiguous
    assert np.array_equal(healed.healthy, expected)
    assert case.healthy is None
    assert case.healthy_file == folder / f"{STEM}_desc-healthy_FLAIR.nii.gz"


def test_what_is_written_says_what_it_was_made_of(folder):
    case = read(folder)
    path = folder / "again.nii.gz"
    write_healthy(path, case, inpainter())
    image = nib.load(path)
    assert np.array_equal(np.asarray(image.dataobj), inpainter().fill(case.flair, case.lesions))
    assert np.array_equal(image.affine, case.affine)
    record = json.loads((folder / "again.json").read_text())
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    flair = (folder / f"{STEM}_FLAIR.nii.gz").read_bytes()
    assert record["sources"]["flair"] == hashlib.sha256(flair).hexdigest()
    assert set(record["sources"]) == {"flair", "mask"}
    assert str(folder) not in (folder / "again.json").read_text()


def test_without_a_stored_one_it_is_filled_without_a_word(folder):
    for path in folder.glob("*healthy*"):
        path.unlink()
    case = read(folder)
    assert case.healthy_file is None
    assert stored_healthy(case, inpainter()) is None
    assert np.array_equal(heal(case, inpainter()).healthy, inpainter().fill(case.flair, case.lesions))


def rewrite(path, change):
    image = nib.load(path)
    data = np.asarray(image.dataobj).copy()
    change(data)
    nib.save(nib.Nifti1Image(data, image.affine, image.header), path)


def brighter(data):
    data[20, 28, 20] *= 1.5


def one_less(data):
    data[tuple(np.argwhere(data)[0])] = 0


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def record_of(folder):
    return folder / f"{STEM}_desc-healthy_FLAIR.json"


FAULTS = {
    "another FLAIR": (lambda d: rewrite(d / f"{STEM}_FLAIR.nii.gz", brighter), "sources"),
    "another mask": (lambda d: rewrite(d / f"{STEM}_desc-lesions_mask.nii.gz", one_less), "sources"),
    "labels that were not there": (
        lambda d: nib.save(nib.load(d / f"{STEM}_desc-lesions_mask.nii.gz"), d / f"{STEM}_dseg.nii.gz"),
        "sources",
    ),
    "a flipped byte": (lambda d: flip_byte(d / f"{STEM}_desc-healthy_FLAIR.nii.gz"), ""),
    "another volume": (lambda d: rewrite(d / f"{STEM}_desc-healthy_FLAIR.nii.gz", brighter), "sha256"),
    "no record": (lambda d: record_of(d).unlink(), "no readable record"),
    "half a record": (lambda d: record_of(d).write_bytes(record_of(d).read_bytes()[:-20]), "no readable record"),
    "a list": (lambda d: record_of(d).write_text("[]"), "no readable record"),
    "null": (lambda d: record_of(d).write_text("null"), "no readable record"),
    "an empty record": (lambda d: record_of(d).write_text("{}"), "no readable record"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_come_out_different_is_filled_again(folder, fault):
    make, named = FAULTS[fault]
    make(folder)
    case = read(folder)
    with pytest.warns(InputWarning) as caught:
        healed = heal(case, inpainter())
    (said,) = [str(w.message) for w in caught]
    assert said.startswith(f"data/{STEM}_desc-healthy_FLAIR.nii.gz: made of something else (")
    assert said.endswith("); filled again")
    assert named in said
    assert np.array_equal(healed.healthy, inpainter().fill(case.flair, case.lesions))


@pytest.mark.parametrize(
    ("options", "named"), [({"sha256": "other"}, "(inpainter)"), ({"precision": "bf16"}, "(precision)")]
)
def test_another_network_fills_it_again(folder, options, named):
    case = read(folder)
    other = inpainter(**options)
    with pytest.warns(InputWarning) as caught:
        healed = heal(case, other)
    assert named in str(caught[0].message)
    assert np.array_equal(healed.healthy, other.fill(case.flair, case.lesions))


def test_another_version_fills_it_again(folder, monkeypatch):
    monkeypatch.setattr(synthlong, "__version__", "999")
    with pytest.warns(InputWarning, match="versions"):
        heal(read(folder), inpainter())


# --- a run

OPTIONS = {
    "pairs": 2,
    "seed": 3,
    "shard_size": 2,
    "workers": 1,
    "config": SynthesisConfig(box=32, painter="ellipsoid", artifacts="none", precision=default_precision("cpu")),
}


def shards(folder, name):
    """Every byte of a run, and what it said of healthy volumes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = generate(folder, folder.parent / name, **OPTIONS)
    assert (outcome.pairs, outcome.failures) == (2, {})
    return bytes_of(folder.parent / name), [str(w.message) for w in caught if "healthy" in str(w.message)]


@pytest.fixture
def one_case(manifest, tmp_path):
    """A folder of one case without a healthy volume."""
    folder = tmp_path / "cases"
    folder.mkdir()
    for name, what in (("FLAIR", "FLAIR"), ("mask", "desc-lesions_mask")):
        (folder / f"{STEM}_{what}.nii.gz").write_bytes((manifest.parent / f"cs07_{name}.nii.gz").read_bytes())
    return folder


def test_a_run_makes_the_same_shards_with_and_without(one_case):
    without, said = shards(one_case, "without")
    assert said == []
    network = Inpainter.read(precision=default_precision("cpu"))
    write_healthy(one_case / f"{STEM}_desc-healthy_FLAIR.nii.gz", read(one_case), network)
    stored, said = shards(one_case, "stored")
    assert said == []
    assert stored == without


@pytest.mark.filterwarnings("ignore::synthlong.errors.InputWarning")
def test_a_run_takes_the_stored_volume(folder):
    """Another volume, with a record that vouches for it, is what the run works with."""
    network = Inpainter.read(precision=default_precision("cpu"))
    path = folder / f"{STEM}_desc-healthy_FLAIR.nii.gz"
    write_healthy(path, read(folder), network)
    rewrite(path, lambda data: np.multiply(data, 1.25, out=data))
    record = json.loads(record_of(folder).read_text()) | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    record_of(folder).write_text(json.dumps(record))
    config = OPTIONS["config"]
    (files,) = find_cases(folder)
    task = prepare_case(CaseTask(files, folder / "work", config, asset_hashes(config)))
    assert task.failure is None
    assert np.array_equal(open_case(folder / "work", config).healthy, np.asarray(nib.load(path).dataobj))
