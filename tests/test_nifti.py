import gzip
import hashlib
import logging
import os
import struct
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthlong.errors import ConfigError, InputError, OutputError
from synthlong.nifti import read_nifti, write_nifti

AFFINE = np.array([[-1.0, 0, 0, 90], [0, 1.5, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
SHAPE = (6, 7, 8)
DATA = np.random.default_rng(0).normal(100, 20, SHAPE).astype(np.float32)
# name: (format, offset) of NIfTI-1 header fields, little endian
FIELDS = {
    "sizeof_hdr": ("i", 0),
    "rank": ("h", 40),
    "dim1": ("h", 42),
    "dim2": ("h", 44),
    "dim3": ("h", 46),
    "dim4": ("h", 48),
    "datatype": ("h", 70),
    "qfac": ("f", 76),
    "pixdim1": ("f", 80),
    "vox_offset": ("f", 108),
    "scl_slope": ("f", 112),
    "scl_inter": ("f", 116),
    "xyzt_units": ("B", 123),
    "descrip": ("80s", 148),
    "qform_code": ("h", 252),
    "sform_code": ("h", 254),
    "quatern_b": ("f", 256),
    "qoffset_x": ("f", 268),
    "srow_x0": ("f", 280),
    "srow_x3": ("f", 292),
    "magic": ("4s", 344),
}


def nifti(data=DATA, *, affine=AFFINE, kind=nib.Nifti1Image, endianness="<", sform=1, qform=1, **fields) -> bytes:
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(data.dtype)
    image = kind(data, affine, header)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    content = bytearray(image.to_bytes())
    for name, value in fields.items():
        form, at = FIELDS[name]
        struct.pack_into("<" + form, content, at, value)
    return bytes(content)


@pytest.fixture
def put(tmp_path):
    def put(content: bytes, name="scan.nii.gz", *, zipped=True) -> Path:
        path = tmp_path / name
        path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
        return path

    return put


def refused(path, match, **options) -> InputError:
    with pytest.raises(InputError, match=match) as caught:
        read_nifti(path, **options)
    assert caught.type is InputError
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 200
    assert "/tmp" not in message  # no absolute path
    return caught.value


# What is read


def test_reads_data_affine_and_hash(put):
    path = put(nifti())
    volume = read_nifti(str(path))
    assert np.array_equal(volume.data, DATA)
    assert volume.data.dtype == np.float32
    assert volume.data.flags.f_contiguous
    assert volume.affine.dtype == np.float64
    assert np.allclose(volume.affine, AFFINE, atol=1e-6)
    assert volume.path == path
    assert volume.coded
    assert volume.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("name", "zipped"), [("a.nii", True), ("b.nii.gz", False), ("c.dat", True)])
def test_gzip_is_told_by_content(put, name, zipped):
    assert np.array_equal(read_nifti(put(nifti(), name, zipped=zipped)).data, DATA)


def test_symbolic_link_is_followed(put, tmp_path):
    link = tmp_path / "link.nii.gz"
    link.symlink_to(put(nifti()))
    assert np.array_equal(read_nifti(link).data, DATA)


@pytest.mark.parametrize("cut", [1, 100, 348, 900])
def test_many_gzip_members(put, cut):
    content = nifti()
    parts = [content[:cut], b"", content[cut:]]
    path = put(b"".join(gzip.compress(part) for part in parts), zipped=False)
    assert np.array_equal(read_nifti(path).data, DATA)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endianness", "<>")
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_every_real_dtype_in_both_byte_orders(put, kind, endianness, dtype):
    data = DATA.astype(endianness + dtype)
    volume = read_nifti(put(nifti(data, kind=kind, endianness=endianness)))
    assert np.array_equal(volume.data, data.astype(np.float32))
    assert volume.data.dtype.isnative
    assert np.allclose(volume.affine, AFFINE, atol=1e-5)


def test_scaled_int16_equals_nibabel(put):
    path = put(nifti(DATA.astype(np.int16), scl_slope=0.37, scl_inter=-12.5))
    assert np.array_equal(read_nifti(path).data, nib.load(path).get_fdata().astype(np.float32))


@pytest.mark.parametrize("slope", [0, np.nan])
def test_slope_zero_or_nan_means_unscaled(put, slope):
    path = put(nifti(DATA.astype(np.int16), scl_slope=slope, scl_inter=np.nan))
    assert np.array_equal(read_nifti(path).data, DATA.astype(np.int16))


@pytest.mark.parametrize("more", [(1,), (1, 1), (1, 1, 1, 1)])
def test_trailing_axes_of_one_are_dropped(put, more):
    assert np.array_equal(read_nifti(put(nifti(DATA.reshape(SHAPE + more)))).data, DATA)


def test_extension_is_skipped(put):
    image = nib.Nifti1Image(DATA, AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(2, b"not DICOM" * 50))
    assert np.array_equal(read_nifti(put(image.to_bytes())).data, DATA)


def test_offset_zero_means_the_least(put):
    assert np.array_equal(read_nifti(put(nifti(vox_offset=0))).data, DATA)


def test_zeros_may_follow_the_voxels(put):
    assert np.array_equal(read_nifti(put(nifti() + bytes(1 << 16))).data, DATA)


def test_large_volume_of_many_pieces(put):
    data = np.random.default_rng(1).integers(0, 9, (130, 120, 110)).astype(np.float32)
    path = put(gzip.compress(nifti(data), 1), zipped=False)
    assert np.array_equal(read_nifti(path).data, data)


# Where it lies


def test_uncoded_affine_is_nibabels_guess(put):
    path = put(nifti(sform=0, qform=0))
    volume = read_nifti(path)
    assert not volume.coded
    assert np.allclose(volume.affine, nib.load(path).affine)
    assert not read_nifti(path, prefer="sform").coded


def test_uncoded_affine_of_4d(put):
    path = put(nifti(DATA[..., None], sform=0, qform=0))
    assert np.allclose(read_nifti(path).affine, nib.load(path).affine)


@pytest.mark.parametrize("seed", range(8))
def test_qform_equals_nibabels(put, seed):
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]  # of either handedness
    affine = nib.affines.from_matvec(turn * (0.8, 1.1, 3), (10, -20, 30))
    path = put(nifti(affine=affine, sform=0))
    assert np.allclose(read_nifti(path).affine, nib.load(path).affine, atol=1e-6)
    assert np.allclose(read_nifti(path).affine, affine, atol=1e-2)


def test_half_turn_survives_float32(put):
    # (0, r, r, 0) with r = sqrt(1/2) in float32 leaves 1 - 2 r^2 = 3e-8, which nibabel takes as a tilt
    affine = np.array([[0, 1.0, 0, -90], [1, 0, 0, -120], [0, 0, -1, 70], [0, 0, 0, 1]])
    volume = read_nifti(put(nifti(affine=affine, sform=0)))
    assert np.allclose(volume.affine, affine, atol=1e-6)


@pytest.mark.parametrize(("qfac", "sign"), [(0, 1), (1, 1), (4, 1), (-1, -1)])
def test_qfac(put, qfac, sign):
    volume = read_nifti(put(nifti(affine=np.diag([1.0, 2, 3, 1]), sform=0, qfac=qfac)))
    assert np.allclose(volume.affine, np.diag([1, 2, 3 * sign, 1]))


def test_disagreeing_forms_need_a_preference(put):
    path = put(nifti(srow_x3=91))
    error = refused(path, "sform and qform disagree by 1 mm")
    assert "pass --prefer sform or --prefer qform" in error.way_out
    assert read_nifti(path, prefer="sform").affine[0, 3] == 91
    assert read_nifti(path, prefer="qform").affine[0, 3] == 90


def test_disagreement_is_measured_at_the_corners(put):
    read_nifti(put(nifti(srow_x3=90.09)))
    read_nifti(put(nifti(srow_x0=-1.015)))  # 5 steps of 0.015 mm
    refused(put(nifti(srow_x0=-1.025)), "disagree by 0.125 mm")


def test_preference_falls_back_on_the_other(put):
    assert read_nifti(put(nifti(sform=0, srow_x3=500)), prefer="sform").affine[0, 3] == 90
    assert read_nifti(put(nifti(qform=0, qoffset_x=500)), prefer="qform").affine[0, 3] == 90


def test_preference_skips_the_other_forms_faults(put):
    for fault in ({"quatern_b": 2}, {"pixdim1": 0}, {"qfac": np.nan}, {"qoffset_x": np.nan}):
        path = put(nifti(**fault))
        assert np.allclose(read_nifti(path, prefer="sform").affine, AFFINE)
        if "qoffset_x" not in fault:
            assert "--prefer sform" in refused(path, "qform is not|pixdim").way_out
    assert np.allclose(read_nifti(put(nifti(srow_x0=np.nan)), prefer="qform").affine, AFFINE)


def test_unknown_preference(put):
    with pytest.raises(ConfigError, match="sform or qform"):
        read_nifti(put(nifti()), prefer="best")


# What is refused: paths


def test_missing(tmp_path):
    refused(tmp_path / "none.nii.gz", "does not exist")
    refused(tmp_path / "a\0b.nii", "cannot be read")


def test_below_a_file(put):
    refused(put(nifti()) / "scan.nii", "cannot be read")


def test_link_to_itself(tmp_path):
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    refused(tmp_path / "loop.nii", "cannot be read")


def test_folder(tmp_path):
    refused(tmp_path, "is a folder")


@pytest.mark.timeout(5)
def test_fifo_and_device_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "link.nii").symlink_to(tmp_path / "pipe.nii")
    refused(tmp_path / "pipe.nii", "not a regular file")
    refused(tmp_path / "link.nii", "not a regular file")
    refused("/dev/zero", "not a regular file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission(put):
    path = put(nifti())
    path.chmod(0)
    refused(path, "Permission denied")


def test_permission_denied_on_open(put, monkeypatch):
    def deny(self, *args, **options):
        raise PermissionError(13, "Permission denied", str(self))

    path = put(nifti())
    monkeypatch.setattr(Path, "open", deny)
    refused(path, r"cannot be read \(Permission denied\)")


# What is refused: bytes


@pytest.mark.parametrize("content", [b"", gzip.compress(b"", mtime=0)])
def test_empty(put, content):
    refused(put(content, zipped=False), "is empty")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"n", "is not NIfTI"),
        (b"some text\n" * 200, "is not NIfTI"),
        (bytes(1000), "is not NIfTI"),
        (bytes(128) + b"DICM" + bytes(1000), "is DICOM"),
        (nifti()[:347], "is not NIfTI"),
        (nifti(magic=b"\0\0\0\0"), "is not NIfTI"),  # Analyze 7.5
        (nifti(sizeof_hdr=540), "is not NIfTI"),
        (nifti(magic=b"ni1\0"), "hdr/.img pair"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_other_formats(put, content, problem, zipped):
    refused(put(content, zipped=zipped), problem)


def test_twice_compressed(put):
    refused(put(gzip.compress(nifti())), "is not NIfTI")


def test_pair(tmp_path):
    nib.save(nib.Nifti1Pair(DATA, AFFINE), tmp_path / "one.img")
    nib.save(nib.Nifti2Pair(DATA, AFFINE), tmp_path / "two.img")
    refused(tmp_path / "one.hdr", "hdr/.img pair")
    refused(tmp_path / "two.hdr", "hdr/.img pair")
    refused(tmp_path / "one.img", "is not NIfTI")


def test_every_truncation_of_gzip(put):
    content = gzip.compress(nifti(), mtime=0)
    for end in [*range(2, 40), *range(40, len(content), 61), *range(len(content) - 10, len(content))]:
        refused(put(content[:end], zipped=False), "is a truncated gzip file")


def test_truncation_at_a_members_end(put):
    refused(put(nifti()[:-4]), "claims 1696 bytes but 1692 are there")
    refused(put(nifti()[:-4], zipped=False), "claims 1696 bytes but 1692 are there")
    refused(put(nifti()[:348]), "claims 1696 bytes but 348 are there")


@pytest.mark.parametrize("tail", [b"garbage", b"\0" * 8, b"\x1f", b"\x1f\x8b\x08"])
def test_garbage_after_gzip(put, tail):
    refused(put(gzip.compress(nifti()) + tail, zipped=False), "is a (corrupt|truncated) gzip file")


@pytest.mark.parametrize("back", [1, 5, 9, 200])
def test_corrupt_gzip(put, back):
    content = bytearray(gzip.compress(nifti()))
    content[-back] ^= 0x55
    refused(put(bytes(content), zipped=False), "is a (corrupt|truncated) gzip file")


def test_more_than_the_header_claims(put):
    for tail in (b"\1", bytes((1 << 16) + 1), bytes(3 << 20)):
        for zipped in (True, False):
            refused(put(nifti() + tail, zipped=zipped), "holds more than the 1696 bytes its header claims")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"rank": 0}, "claims 0 dimensions"),
        ({"rank": 8}, "claims 8 dimensions"),
        ({"rank": -3}, "claims -3 dimensions"),
        ({"dim1": 0}, "claims 0 x 7 x 8 voxels"),
        ({"dim2": -7}, "claims 6 x -7 x 8 voxels"),
        ({"dim1": -1, "dim2": 1, "dim3": 1}, "claims -1 x 1 x 1 voxels"),
        ({"dim3": 2049}, "claims 6 x 7 x 2049 voxels"),
        ({"dim1": 2048, "dim2": 2048, "dim3": 2048}, "claims 2048 x 2048 x 2048 voxels"),
        ({"dim1": 1000, "dim2": 1000, "dim3": 1000}, "claims 4000000352 bytes but 1696 are there"),
        ({"rank": 4, "dim4": 0}, "claims 6 x 7 x 8 x 0 voxels"),
        ({"dim3": 9}, "claims 1864 bytes but 1696 are there"),
        ({"dim3": 7}, "holds more than the 1528 bytes"),
        ({"datatype": 4}, "holds more than the 1024 bytes"),
        ({"datatype": 64}, "claims 3040 bytes but 1696 are there"),
        ({"vox_offset": 368}, "claims 1712 bytes but 1696 are there"),
        ({"vox_offset": 348}, "start at byte 348"),
        ({"vox_offset": -352}, "start at byte -352"),
        ({"vox_offset": 352.5}, "start at byte 352.5"),
        ({"vox_offset": 1e20}, "start at byte 1e[+]20"),
        ({"vox_offset": np.nan}, "start at byte nan"),
        ({"vox_offset": np.inf}, "start at byte inf"),
        ({"rank": 4, "dim4": 2}, r"holds 2 volumes \(6 x 7 x 8 x 2\)"),
        ({"rank": 2}, r"is not 3-D \(6 x 7\)"),
        ({"rank": 1}, r"is not 3-D \(6\)"),
        ({"dim3": 1}, r"is not 3-D \(6 x 7 x 1\)"),
        ({"datatype": 0}, "NIfTI datatype 0"),
        ({"datatype": 1}, "NIfTI datatype 1"),
        ({"datatype": 32}, "NIfTI datatype 32"),
        ({"datatype": 128}, "NIfTI datatype 128"),
        ({"datatype": 2304}, "NIfTI datatype 2304"),
        ({"datatype": 1792}, "NIfTI datatype 1792"),
        ({"datatype": 77}, "NIfTI datatype 77"),
        ({"scl_slope": np.inf}, "scaling is not finite"),
        ({"scl_inter": np.nan}, "scaling is not finite"),
        ({"scl_slope": 3e38}, "holds 336 NaN or infinite voxels"),
        ({"xyzt_units": 3}, "metres or microns"),
        ({"qform_code": 0, "srow_x0": np.nan}, "affine is not finite"),
        ({"qform_code": 0, "srow_x3": np.inf}, "affine is not finite"),
        ({"qform_code": 0, "srow_x0": 0}, "affine is not finite or has no plausible voxel size"),
        ({"sform_code": 0, "qoffset_x": np.nan}, "affine is not finite"),
        ({"srow_x0": np.nan}, "disagree by nan mm"),
        ({"pixdim1": 0}, "pixdim"),
        ({"pixdim1": -1}, "pixdim"),
        ({"sform_code": 0, "pixdim1": np.nan}, "pixdim"),
        ({"sform_code": 0, "qform_code": 0, "pixdim1": np.inf}, "pixdim"),
        ({"quatern_b": 1.1}, "qform is not a rotation"),
        ({"quatern_b": np.nan}, "qform is not a rotation"),
        ({"qfac": np.nan}, "qform is not a rotation"),
    ],
)
def test_lying_or_unusable_header(put, fields, problem):
    content = nifti(descrip=b"patient name", **fields)
    for zipped in (True, False):
        assert "patient" not in str(refused(put(content, zipped=zipped), problem))


def test_singular_affine(put):
    content = bytearray(nifti(qform=0))
    struct.pack_into("<4f", content, 296, -1, 0, 0, 0)  # srow_y along srow_x
    refused(put(bytes(content)), "affine")
    struct.pack_into("<4f", content, 280, 1, 1, 0, 0)
    struct.pack_into("<4f", content, 296, 1, 1, 0, 0)
    refused(put(bytes(content)), "affine is singular")


def test_more_volumes(put):
    refused(put(nifti(np.stack([DATA, DATA], axis=-1))), "holds 2 volumes")
    refused(put(nifti(np.stack([DATA] * 3, axis=-1)[..., None, :])), "holds 3 volumes")


@pytest.mark.parametrize("data", [DATA[0], DATA[0, 0], DATA[:, :, :1], DATA.astype(np.complex64)])
def test_not_a_volume(put, data):
    refused(put(nifti(data)), "is not 3-D|datatype 32")


def test_color(put):
    color = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(put(nib.Nifti1Image(color, AFFINE).to_bytes()), "datatype 128")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_voxels_not_finite(put, value, dtype):
    data = DATA.astype(dtype)
    with np.errstate(over="ignore"):
        data[1, 2, 3] = data[0, 0, 0] = value
    refused(put(nifti(data, scl_slope=1, scl_inter=0)), "holds 2 NaN or infinite voxels", allow_empty=True)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_constant(put, value, dtype):
    path = put(nifti(np.full(SHAPE, value, dtype)))
    refused(path, f"is constant .all voxels {value}.")
    assert (read_nifti(path, allow_empty=True).data == value).all()


def test_bomb_is_not_inflated(put):
    content = gzip.compress(nifti() + bytes(200 << 20), 1)
    path = put(content, zipped=False)
    bombs = [path, put(gzip.compress(nifti(vox_offset=1e7)) + content, "late.nii.gz", zipped=False)]
    bombs.append(put(nifti(dim1=1000, dim2=1000, dim3=1000), "claim.nii.gz"))
    for bomb in bombs:
        tracemalloc.start()
        refused(bomb, "its header claims")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32 << 20


def test_nothing_is_logged_or_warned(put, caplog, capfd):
    path = put(nifti(vox_offset=0, qfac=0, xyzt_units=0))
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        read_nifti(path, prefer="sform")
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


# Fuzz

PLAIN = nifti((DATA * 10).astype(np.int16), scl_slope=0.1)
EXPECTED = ((DATA * 10).astype(np.int16) * np.float64(np.float32(0.1))).astype(np.float32)
TWO = gzip.compress(PLAIN[:700], mtime=0) + gzip.compress(PLAIN[700:], mtime=0)
fuzz = settings(
    max_examples=300,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def read_or_refuse(path):
    try:
        return read_nifti(path)
    except InputError:
        return None


@fuzz
@given(st.integers(0, len(TWO) - 1), st.integers(1, 255), st.integers(0, len(TWO)), st.booleans())
def test_damaged_gzip_is_refused_or_read_the_same(put, at, flip, end, cut):
    content = bytearray(TWO)
    content[at] ^= flip
    volume = read_or_refuse(put(bytes(content[: end if cut else None]), zipped=False))
    if volume is not None:  # a flip in the gzip header, such as its time
        assert np.array_equal(volume.data, EXPECTED)


@fuzz
@given(st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=6), st.booleans())
def test_damaged_header_is_refused_or_read_finite(put, edits, second):
    content = bytearray(nifti(kind=nib.Nifti2Image) if second else PLAIN)
    for at, value in edits:
        content[at] = value
    volume = read_or_refuse(put(bytes(content), zipped=False))
    if volume is not None:
        assert volume.data.shape[0] > 1
        assert np.isfinite(volume.data).all()
        assert np.isfinite(np.linalg.inv(volume.affine)).all()


@fuzz
@given(st.binary(max_size=800), st.sampled_from([b"", b"\x1f\x8b\x08", PLAIN[:348], TWO[:200]]))
def test_any_bytes(put, content, start):
    read_or_refuse(put(start + content, zipped=False))


# Writing


@pytest.mark.parametrize("name", ["out.nii.gz", "out.nii"])
@pytest.mark.parametrize("data", [DATA, np.asfortranarray(DATA), DATA[::-1], (DATA > 100).astype(np.uint8)])
def test_round_trip_is_exact(tmp_path, name, data):
    before = data.copy()
    write_nifti(tmp_path / name, data, AFFINE)
    volume = read_nifti(tmp_path / name)
    assert np.array_equal(volume.data, data)
    assert np.array_equal(volume.affine, AFFINE)
    assert np.array_equal(data, before)
    assert volume.coded
    assert os.listdir(tmp_path) == [name]


def test_written_header(tmp_path):
    path = tmp_path / "mask.nii.gz"
    write_nifti(path, (DATA > 100).astype(np.uint8), AFFINE)
    image = nib.load(path)
    header = image.header
    assert np.array_equal(np.asanyarray(image.dataobj), DATA > 100)
    assert image.get_data_dtype() == np.uint8
    assert header.get_xyzt_units()[0] == "mm"
    assert (header["sform_code"], header["qform_code"]) == (4, 4)
    assert np.allclose(header.get_qform(), header.get_sform())
    assert header["descrip"].item() == b""
    assert image.dataobj.slope == 1
    assert image.dataobj.inter == 0
    write_nifti(path, DATA, AFFINE, code=1)
    assert nib.load(path).header["sform_code"] == 1


def test_write_is_deterministic(tmp_path, monkeypatch):
    write_nifti(tmp_path / "a.nii.gz", DATA, AFFINE)
    monkeypatch.setattr("time.time", lambda: 0.0)
    write_nifti(tmp_path / "b.nii.gz", np.asfortranarray(DATA), AFFINE.tolist())
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "b.nii.gz").read_bytes()
    assert content[3:8] == bytes(5)  # no name, no time


def test_shear_goes_to_the_sform_only(tmp_path):
    affine = AFFINE.copy()
    affine[0, 1] = 0.25
    write_nifti(tmp_path / "a.nii.gz", DATA, affine)
    assert np.array_equal(read_nifti(tmp_path / "a.nii.gz").affine, affine)
    assert nib.load(tmp_path / "a.nii.gz").header["qform_code"] == 0


@pytest.mark.parametrize("data", [DATA.astype(np.float64), DATA[0], DATA > 100, DATA.astype(">f4")])
def test_write_refuses_other_arrays(tmp_path, data):
    with pytest.raises(ValueError, match="3-D float32 or uint8"):
        write_nifti(tmp_path / "a.nii.gz", data, AFFINE)
    assert os.listdir(tmp_path) == []


def test_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    write_nifti(path, DATA, AFFINE)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_nifti(path, DATA + 1, AFFINE)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.nii.gz"]


def test_write_where_it_cannot(tmp_path, put):
    (tmp_path / "folder.nii.gz").mkdir()
    for path in (tmp_path / "none" / "a.nii", put(nifti()) / "a.nii", tmp_path / "folder.nii.gz"):
        with pytest.raises(OutputError, match="cannot be written"):
            write_nifti(path, DATA, AFFINE)
    assert sorted(os.listdir(tmp_path)) == ["folder.nii.gz", "scan.nii.gz"]
