import h5py
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat
from scipy.spatial.transform import Rotation

from synthlong.errors import InputError
from synthlong.preparation.ways import middle_of, read_way, way_of, way_text

POINTS = np.array([[0, 0, 0], [10, 0, 0], [0, -20, 5], [33.3, 44.4, -55.5]])
LPS = np.array([-1, -1, 1])

seeds = st.integers(0, 2**31 - 1)
coordinates = st.tuples(*[st.floats(-100, 100)] * 3)
angles = st.tuples(*[st.floats(-60, 60)] * 3)


def moved(transform, points_ras):
    """What ITK makes of points: its world is LPS."""
    return np.array([transform.TransformPoint((p * LPS).tolist()) for p in points_ras]) * LPS


def apply(way, points):
    return points @ way[:3, :3].T + way[:3, 3]


def way(angles_deg, shift):
    result = np.eye(4)
    result[:3, :3] = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix()
    result[:3, 3] = shift
    return result


def affine_transform(angles_deg=(10, -20, 30), shift=(4, 5, -6), centre=(7, 80, -9), scale=1.1):
    """ITK's, with a centre of rotation."""
    transform = sitk.AffineTransform(3)
    matrix = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix() * (scale, 1, 0.9)
    transform.SetMatrix(matrix.ravel().tolist())
    transform.SetTranslation(shift)
    transform.SetCenter(centre)
    return transform


# --- reading


@settings(max_examples=30, deadline=None)
@given(angles, coordinates, coordinates)
def test_parameters_and_centre_mean_what_itk_means(angles_deg, shift, centre):
    transform = affine_transform(angles_deg, shift, centre)
    found = way_of(np.array(transform.GetParameters()), np.array(transform.GetFixedParameters()))
    assert apply(found, POINTS) == pytest.approx(moved(transform, POINTS), abs=1e-9)


@pytest.mark.parametrize("name", ["x.txt", "x.tfm", "x.mat"])
def test_what_itk_writes(tmp_path, name):
    transform = affine_transform()
    sitk.WriteTransform(transform, str(tmp_path / name))
    found = read_way(tmp_path / name)
    assert found.shape == (4, 4)
    assert apply(found, POINTS) == pytest.approx(moved(transform, POINTS), abs=1e-9)
    assert np.abs(found[:3, 3]).max() > 1  # the centre matters


@pytest.mark.parametrize("name", ["x.txt", "x.mat"])
@pytest.mark.parametrize("zyx", [None, False, True])
def test_rigid_transforms(tmp_path, name, zyx):
    if zyx is None:
        transform = sitk.VersorRigid3DTransform((0.1, -0.3, 0.2, 0.86**0.5), (4, 5, -6), (10, 20, -30))
    else:
        transform = sitk.Euler3DTransform((10, 20, -30), 0.3, -0.2, 0.5, (4, 5, -6))
        transform.SetComputeZYX(zyx)
    sitk.WriteTransform(transform, str(tmp_path / name))
    assert apply(read_way(tmp_path / name), POINTS) == pytest.approx(moved(transform, POINTS), abs=1e-9)


def test_the_ways_of_itk_snap(tmp_path):
    """Under the base class's name, in single precision, with CRLF and a blank line."""
    text = (
        "#Insight Transform File V1.0\r\n#Transform 0\r\nTransform: MatrixOffsetTransformBase_float_3_3\r\n"
        "Parameters: 0 -1 0 1 0 0 0 0 1 5 6 7\r\nFixedParameters: 10 0 0\r\n\r\n"
    )
    (tmp_path / "snap.txt").write_bytes(text.encode())
    found = read_way(str(tmp_path / "snap.txt"))
    # LPS: a quarter turn about (10, 0, 0), then (5, 6, 7): (0, 0, 0) -> (10, -10, 0) + (5, 6, 7)
    assert apply(found, np.zeros((1, 3))) == pytest.approx(np.array([[-15, 4, 7]]))


def mat(path, parameters, fixed, kind="AffineTransform_double_3_3"):
    """What ANTs writes: MATLAB 4, columns."""
    values = {kind: np.reshape(parameters, (-1, 1)).astype(float), "fixed": np.reshape(fixed, (-1, 1)).astype(float)}
    savemat(path, values, format="4")
    return path


def test_the_binary_files_of_ants(tmp_path):
    transform = affine_transform()
    path = mat(tmp_path / "0GenericAffine.mat", transform.GetParameters(), transform.GetFixedParameters())
    assert apply(read_way(path), POINTS) == pytest.approx(moved(transform, POINTS), abs=1e-9)


def test_what_ants_itself_writes(tmp_path):
    ants = pytest.importorskip("ants")
    transform = ants.new_ants_transform(dimension=3, transform_type="AffineTransform")
    there = affine_transform()
    transform.set_parameters(there.GetParameters())
    transform.set_fixed_parameters(there.GetFixedParameters())
    ants.write_transform(transform, str(tmp_path / "x.mat"))
    found = read_way(tmp_path / "x.mat")
    expected = np.array([transform.apply_to_point((p * LPS).tolist()) for p in POINTS]) * LPS
    assert apply(found, POINTS) == pytest.approx(expected, abs=1e-4)


# --- refusing


def refused(path, *parts):
    with pytest.raises(InputError) as caught:
        read_way(path)
    message = str(caught.value)
    assert message.startswith(f"{path.parent.name}/{path.name}: "), message
    assert "\n" not in message
    assert len(message) < 250
    assert caught.value.way_out
    for part in parts:
        assert part in message, message


TEXT = way_text(way((3, 4, 5), (1, 2, 3)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not an ITK transform"),
        ("1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "is not an ITK transform"),  # FSL's
        (TEXT[:60], "is not an ITK transform"),
        (TEXT.split("FixedParameters")[0], "is not an ITK transform"),
        (TEXT.replace("Parameters: ", "Parameters: x "), "is not an ITK transform"),
        (TEXT.replace("Parameters: ", "Parameters: 1 ", 1), "holds a 'AffineTransform_double_3_3'"),
        (TEXT.replace("AffineTransform", "BSplineTransform"), "holds a 'BSplineTransform_double_3_3'"),
        (TEXT + TEXT.split("V1.0\n")[1], "several transforms"),
        (TEXT.replace("Transform: ", "Transformed: "), "several transforms"),
        (way_text(np.diag([1.0, 1, 0, 1])), "cannot be inverted"),
        (TEXT.replace("Parameters: ", "Parameters: nan ", 1).replace(" 3.0\n", "\n"), "cannot be inverted"),
        (TEXT.replace("Parameters: ", "Parameters: 1e400 ", 1).replace(" 3.0\n", "\n"), "cannot be inverted"),
        ("#Insight \xff\xfe", "is not an ITK transform"),
    ],
)
def test_text_that_is_no_linear_transform(tmp_path, content, said):
    path = tmp_path / "x.txt"
    path.write_bytes(content.encode("latin-1"))
    refused(path, said)


def test_transforms_that_are_not_linear_or_not_one(tmp_path):
    composite = sitk.CompositeTransform([affine_transform(), affine_transform()])
    sitk.WriteTransform(composite, str(tmp_path / "c.txt"))
    refused(tmp_path / "c.txt", "several transforms")
    sitk.WriteTransform(composite, str(tmp_path / "c.h5"))
    refused(tmp_path / "c.h5", "is not an ITK transform")
    field = sitk.Image([4, 4, 4], sitk.sitkVectorFloat64, 3)
    sitk.WriteImage(field, str(tmp_path / "warp.nii.gz"))
    refused(tmp_path / "warp.nii.gz", "is not an ITK transform")
    sitk.WriteTransform(sitk.AffineTransform(2), str(tmp_path / "flat.txt"))
    refused(tmp_path / "flat.txt", "holds a 'AffineTransform_double_2_2'")


def test_binary_files_that_are_no_transform(tmp_path):
    refused(mat(tmp_path / "a.mat", np.zeros(12), np.zeros(3)), "cannot be inverted")
    refused(mat(tmp_path / "b.mat", np.zeros(6), np.zeros(3), "BSplineTransform_double_3_3"), "holds a 'BSpline")
    refused(mat(tmp_path / "c.mat", np.zeros(12), np.zeros(2)), "holds a 'Affine")
    savemat(tmp_path / "d.mat", {"something": np.eye(4)}, format="4")
    refused(tmp_path / "d.mat", "is not an ITK transform")
    savemat(tmp_path / "e.mat", {"fixed": np.zeros((3, 1))}, format="4")
    refused(tmp_path / "e.mat", "is not an ITK transform")
    savemat(tmp_path / "f.mat", {"AffineTransform_double_3_3": "abcdefghijkl", "fixed": np.zeros(3)}, format="4")
    refused(tmp_path / "f.mat", "")
    with h5py.File(tmp_path / "g.mat", "w") as file:
        file["AffineTransform_double_3_3"] = np.zeros(12)
    refused(tmp_path / "g.mat", "is not an ITK transform")


def test_files_that_are_not_there(tmp_path):
    refused(tmp_path / "none.mat", "cannot be read (No such file or directory)", "check the path")
    refused(tmp_path, "cannot be read (Is a directory)")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_is_refused_or_harmless(tmp_path_factory, data):
    """Any bytes give a way or an InputError."""
    path = tmp_path_factory.getbasetemp() / "damaged.mat"
    whole = bytearray(mat(path, affine_transform().GetParameters(), (1, 2, 3)).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        found = read_way(path)
    except InputError:
        return
    assert np.isfinite(found).all()


# --- writing


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_a_way_is_read_back_bit_for_bit(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    matrix = np.eye(4)
    matrix[:3] = rng.normal(size=(3, 4)) * 10.0 ** rng.integers(-3, 4, (3, 4))
    if abs(np.linalg.det(matrix[:3, :3])) < 1e-5:
        return
    path = tmp_path_factory.getbasetemp() / "way.txt"
    path.write_text(way_text(matrix))
    assert np.array_equal(read_way(path), matrix)


def test_itk_reads_what_is_written(tmp_path):
    there = way((12, -7, 33), (1.5, -20, 100))
    (tmp_path / "x.txt").write_text(way_text(there))
    transform = sitk.ReadTransform(str(tmp_path / "x.txt"))
    assert moved(transform, POINTS) == pytest.approx(apply(there, POINTS), abs=1e-9)


# --- the middle


def angle_deg(matrix):
    return np.rad2deg(Rotation.from_matrix(matrix[:3, :3]).magnitude())


def test_one_visit_is_its_own_middle():
    (only,) = middle_of([np.eye(4)])
    assert only == pytest.approx(np.eye(4))


@settings(max_examples=15, deadline=None)
@given(angles, coordinates)
def test_two_visits_are_equally_far_from_their_middle(angles_deg, shift):
    there = way(angles_deg, shift)
    first, second = middle_of([np.eye(4), there])
    assert second @ np.linalg.inv(first) == pytest.approx(there, abs=1e-6)
    assert first @ second == pytest.approx(np.eye(4), abs=1e-6)  # opposite ways
    assert angle_deg(first) == pytest.approx(angle_deg(there) / 2, abs=1e-4)
    assert angle_deg(second) == pytest.approx(angle_deg(there) / 2, abs=1e-4)
    assert np.linalg.det(second[:3, :3]) == pytest.approx(1)


@settings(max_examples=15, deadline=None)
@given(angles, coordinates)
def test_the_first_visit_is_not_favoured(angles_deg, shift):
    there = way(angles_deg, shift)
    first, second = middle_of([np.eye(4), there])
    one, other = middle_of([np.eye(4), np.linalg.inv(there)])
    assert one == pytest.approx(second, abs=1e-6)
    assert other == pytest.approx(first, abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(coordinates, coordinates, angles)
def test_three_visits(one, other, angles_deg):
    ways = middle_of([np.eye(4), way((0, 0, 0), one), way((0, 0, 0), other)])
    mean = (np.array(one) + other) / 3
    for found, shift in zip(ways, ((0, 0, 0), one, other), strict=True):
        assert found == pytest.approx(way((0, 0, 0), np.array(shift) - mean), abs=1e-6)
    about_z = middle_of([way((0, 0, a), (0, 0, 0)) for a in (0, *angles_deg[:2])])
    turned = [Rotation.from_matrix(w[:3, :3]).as_rotvec(degrees=True) for w in about_z]
    assert np.sum(turned, axis=0) == pytest.approx(0, abs=1e-6)
    assert turned[1][2] - turned[0][2] == pytest.approx(angles_deg[0], abs=1e-6)
