"""Two visits of a patient and the truth, as training and scoring read them."""

import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from synthlong.case import read_case
from synthlong.detection.visits import in_common_brain, read_pair
from synthlong.errors import InputError

BOX = np.s_[66:110, 68:112, 24:68]
"""At the temporal pole: brain, background and lesions."""


@pytest.fixture
def pair(tmp_path, write_volume, real_case):
    """Files of two visits, the second one brighter in the mask, and of that mask."""
    flair, mask, affine = real_case.flair[BOX] * 100, real_case.lesions[BOX], real_case.affine.copy()
    affine[:3, 3] += [axis.start for axis in BOX]
    volumes = {"baseline": flair, "followup": flair * (1 + mask), "new": mask}
    return [write_volume(tmp_path / f"{name}.nii", data, affine) for name, data in volumes.items()]


def test_a_pair_has_its_new_lesions_and_looks_as_without_them(pair):
    before, after = read_pair(*pair, subject="p")
    assert (before.id, after.id) == ("p", "p")
    assert not before.lesions.any()
    assert np.array_equal(after.lesions, read_case(pair[1], pair[2]).lesions)
    assert np.array_equal(after.flair, read_case(pair[1]).flair)
    assert np.array_equal(after.tissue, read_case(pair[1]).tissue)


def test_a_pair_without_new_lesions_needs_no_warning(pair, write_volume):
    image = nib.load(pair[2])
    write_volume(pair[2], 0 * image.get_fdata(), image.affine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not read_pair(*pair)[1].lesions.any()


def test_visits_on_two_grids_are_no_pair(pair, write_volume):
    image = nib.load(pair[0])
    moved = image.affine.copy()
    moved[0, 3] += 1
    write_volume(pair[0], image.get_fdata(), moved)
    with pytest.raises(InputError, match=r"followup\.nii: its grid is not that of the baseline; resample"):
        read_pair(*pair)


def test_one_file_is_no_pair(pair):
    with pytest.raises(InputError, match=r"baseline\.nii: is the baseline itself; pass the later visit"):
        read_pair(pair[0], pair[0], pair[2])


def test_only_what_is_brain_in_both_visits_stays(pair):
    before, after = read_pair(*pair)
    half = np.zeros_like(after.brain)
    half[: half.shape[0] // 2] = 1
    less = replace(after, brain=after.brain * half)
    for one, other in ((before, less), (less, before)):
        first, last = in_common_brain(one, other)
        assert np.array_equal(first.brain, less.brain)
        assert np.array_equal(last.brain, less.brain)
        for cut, whole in ((first, one), (last, other)):
            assert np.array_equal(cut.flair, whole.flair * less.brain)
            assert np.array_equal(cut.lesions, whole.lesions * less.brain)
    with pytest.raises(InputError, match="does not meet that of the baseline"):
        in_common_brain(before, replace(after, brain=1 - before.brain))
