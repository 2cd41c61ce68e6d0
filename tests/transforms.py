"""What the tests of several artifacts do alike."""

import json

import numpy as np
import torch
import torchio as tio

from synthlong import artifacts, networks


def rand(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random(shape, np.float32))


def with_threads(*counts, compute):
    """What `compute()` returns with each number of torch threads."""
    results = []
    with networks.one_thread():  # puts the number back
        for count in counts:
            torch.set_num_threads(count)
            results.append(compute())
    return results


def check_replay(transform, twin, *, affine=None, t1=None):
    """A random transform's history, as JSON, names the twin, which gives the same voxels; labels stay.

    Returns the changed subject.
    """
    subject = tio.Subject(
        flair=tio.ScalarImage(tensor=rand(2, 12, 13, 14), affine=affine),
        t1=tio.ScalarImage(tensor=rand(1, 12, 13, 14, seed=1) if t1 is None else t1, affine=affine),
        lesions=tio.LabelMap(tensor=(rand(1, 12, 13, 14) > 0.5).to(torch.uint8), affine=affine),
    )
    torch.manual_seed(0)
    changed = transform(subject)
    [(name, arguments)] = json.loads(json.dumps(changed.applied_transforms))
    assert name == twin
    again = getattr(artifacts, name)(**arguments)(subject)
    for image in ("flair", "t1", "lesions"):
        assert torch.equal(again[image].data, changed[image].data)
    assert torch.equal(changed.lesions.data, subject.lesions.data)
    assert not torch.equal(changed.flair.data, subject.flair.data)
    return changed
