"""The seam to TorchIO: the only file that knows its transforms.

    RandomArtifact: draw_params(rng) -> params          (all randomness)
    Artifact:       params, affine  -> kernel(x, ...)   (none; this is what history records)

TorchIO (Perez-Garcia et al. 2021, doi:10.1016/j.cmpb.2021.106236) calls a random transform, which builds and calls its
deterministic twin, each with its own copy and parsing. Here one call does it all, and copies no voxels that it
replaces.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torchio as tio
from numpy.typing import NDArray
from torch import Tensor
from torchio.transforms.augmentation import RandomTransform
from torchio.transforms.data_parser import DataParser
from torchio.transforms.intensity_transform import IntensityTransform

from synthlong.artifacts.ranges import check_axis, check_number

__all__ = ["Artifact", "Params", "RandomArtifact", "axial_axis", "on_axis", "part_of", "softened", "spacing_of"]

Params = dict[str, Any]

_ALONE = "default_image_name"  # of an image that comes in no subject, as in TorchIO
_LABELS = ("label", "mask", "seg")


def spacing_of(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the voxel size in mm along each array axis."""
    i, j, k = np.sqrt((np.asarray(affine, np.float64)[:3, :3] ** 2).sum(axis=0)).tolist()
    if not i * j * k > 0:
        raise ValueError(f"the affine gives voxels of {i:g} x {j:g} x {k:g} mm; correct it")
    return i, j, k


def axial_axis(affine: NDArray[np.float64]) -> int:
    """Return the array axis that runs closest to the head's axis, from inferior to superior."""
    columns = np.asarray(affine, np.float64)[:3, :3]
    return int(np.argmax(np.abs(columns[2]) / np.linalg.norm(columns, axis=0)))


def on_axis(params: Params, affine: NDArray[np.float64]) -> Params:
    """Return parameters with the array's axis where they say "axial"."""
    axis = check_axis(params["axis"])
    return {**params, "axis": axial_axis(affine) if axis == "axial" else axis}


def softened(params: Params, identity: Mapping[str, float], severity: float) -> Params:
    """Return parameters moved towards those that change nothing: 0 all the way, 1 not at all."""

    def moved(value: Any, rest: float) -> Any:
        if isinstance(value, (list, tuple)):
            return [moved(v, rest) for v in value]
        if value is None or severity == 1:
            return value
        new = rest + severity * (value - rest)
        return round(new) if isinstance(value, int) else new

    return {name: moved(value, identity[name]) if name in identity else value for name, value in params.items()}


class _Transform(IntensityTransform):
    """What both kinds of transform share: every type of input, one copy, one entry of history."""

    final: ClassVar[type[Artifact]]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.include, self.exclude = (None if k is None else list(k) for k in (self.include, self.exclude))

    @abstractmethod
    def _choose(self, names: list[str]) -> Callable[[str], Params] | None:
        """Return the parameters of each image by name, or None to leave the input alone."""

    @abstractmethod
    def _recorded(self, names: list[str], chosen: Callable[[str], Params]) -> Params:
        """Return the twin's arguments as plain JSON."""

    def __call__(self, data: Any = None, /, **named: Any) -> Any:
        """Apply to an image or several, and return the same type; the input is not changed.

        Args:
            data: `torchio.Subject` or `Image`; tensor or array `(I, J, K)` or `(C, I, J, K)`; a dict, of which the
                floating-point tensors and arrays of rank 4 are images (or those named in `include`); or a SimpleITK
                or NIfTI image. Label maps stay as they are. Whole numbers become float32, but for those of a tensor or
                an array, which would come back as another type.
            **named: The items of a dict instead, as batchgeneratorsv2 passes them.

        Raises:
            ValueError: An image has no voxels, NaN or infinite values, or a tensor or an array has integers; names the
                image. Or a dict has no image, or one that is called a label, mask or segmentation, and no `include`.
        """
        data = named if data is None and named else data
        if isinstance(data, tio.Subject):
            return self._on_subject(data)
        if isinstance(data, (Tensor, np.ndarray)):
            chosen = self._choose([_ALONE])
            return data if chosen is None else self._on_array(_ALONE, data, chosen)
        if isinstance(data, tio.Image):
            return self._on_subject(tio.Subject({_ALONE: data}))[_ALONE]
        if isinstance(data, dict):
            return self._on_dict(data)
        parser = DataParser(data)
        return parser.get_output(self._on_subject(parser.get_subject()))

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        """Change a subject's images in place (TorchIO's hook)."""
        images = self.get_images_dict(subject)
        chosen = self._choose(list(images))
        if chosen is not None:
            self._change(subject, images, chosen)
        return subject

    def _on_subject(self, subject: tio.Subject) -> tio.Subject:
        images: Mapping[str, tio.Image] = self.get_images_dict(subject)
        chosen = self._choose(list(images))
        if chosen is None:
            return subject
        kept = {new: copy.deepcopy(subject.get_image(old)) for old, new in (self.keep or {}).items()}
        if self.copy:
            others = [v for name, v in subject.items() if name not in images]
            shown = {id(v.get("data") if isinstance(v, tio.Image) else v) for v in others}
            replaced = [image.get("data") for image in images.values()]  # not loaded, nor copied: new voxels follow
            memo = {id(v): v for v in replaced if v is not None and id(v) not in shown}
            subject = copy.deepcopy(subject, memo)
            images = {name: subject.get_image(name) for name in images}
        self._change(subject, images, chosen)
        for name, image in kept.items():
            subject.add_image(image, name)
        return subject

    def _change(self, subject: tio.Subject, images: Mapping[str, tio.Image], chosen: Callable[[str], Params]) -> None:
        for name, image in images.items():
            data = image.data if image.data.is_floating_point() else image.data.float()
            image.set_data(self._applied(name, data, image.affine, chosen(name)))
        if images:
            record = self._recorded(list(images), chosen)
            # copy=True: replayed alone, the twin must not change the caller's subject
            arguments = {"include": _plain(self.include), "exclude": _plain(self.exclude), "copy": True, **record}
            subject.applied_transforms.append((self.final.__name__, arguments))

    def _on_dict(self, data: dict[str, Any]) -> dict[str, Any]:
        names = [name for name, value in data.items() if self._is_image(name, value)]
        if not names and self.exclude is None:
            wanted = "a floating-point image of rank 4" if self.include is None else f"an image named in {self.include}"
            raise ValueError(f"no entry of the dict {list(data)} is {wanted}")
        labels = [name for name in names if any(word in str(name).lower() for word in _LABELS)]
        if labels and self.include is None:
            raise ValueError(
                f"'{labels[0]}' would be changed, too; name the images: include={sorted({*names} - {*labels})}"
            )
        chosen = self._choose(names)
        if chosen is None:
            return data
        kept = {new: copy.deepcopy(data[old]) for old, new in (self.keep or {}).items()}
        changed = {name: self._on_array(name, data[name], chosen) for name in names}
        return {**data, **changed, **kept}

    def _is_image(self, name: str, value: Any) -> bool:
        if not isinstance(value, (Tensor, np.ndarray)) or name in (self.label_keys or ()):
            return False
        if self.include is not None:
            return name in self.include
        floating = value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f"
        return floating and value.ndim == 4 and name not in (self.exclude or ())

    def _on_array(self, name: str, data: Any, chosen: Callable[[str], Params]) -> Any:
        """Apply to a tensor or array; a tensor that knows its affine (MONAI's, or by an attribute) keeps it."""
        if data.ndim not in (3, 4):
            problem = f"it must be (I, J, K) or (C, I, J, K), not {tuple(data.shape)}"
            raise ValueError(f"{_called(name)}{problem}")
        affine = getattr(data, "affine", None)
        affine = np.eye(4) if affine is None else np.asarray(affine, np.float64)
        if isinstance(data, np.ndarray):
            native = data.astype(data.dtype.newbyteorder("="), copy=False)
            writeable = np.require(native, requirements=("C", "W"))  # what torch can share
            return self._applied(name, torch.from_numpy(writeable), affine, chosen(name)).numpy()
        result = self._applied(name, data.as_subclass(Tensor), affine, chosen(name))
        if type(data) is Tensor:
            if hasattr(data, "affine"):
                result.affine = data.affine  # type: ignore[attr-defined]
            return result
        like = data.detach().clone()
        like.as_subclass(Tensor).copy_(result)
        return like

    def _applied(self, name: str, x: Tensor, affine: NDArray[np.float64], params: Params) -> Tensor:
        try:
            return self.final.kernel(x, **self.final.on_grid(params, affine))
        except ValueError as error:
            raise ValueError(f"{_called(name)}{error}") from error


class Artifact(_Transform):
    """A deterministic artifact: an image's parameters are arguments, and history records them.

    Subclasses name their `kernel` and list their parameters in `__init__`. Each parameter is a value for all images,
    or a dict with one for each image's name.

    Args:
        params: Names and values of the parameters.
        **kwargs: Of `torchio.Transform`: `p`, `copy`, `include`, `exclude`, `keep`, ...

    Raises:
        ValueError: A parameter outside its range; names parameter, value and range.
    """

    kernel: ClassVar[Callable[..., Tensor]]

    def __init_subclass__(cls) -> None:
        cls.final = cls

    def __init__(self, params: Params, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        vars(self).update(params)
        self.args_names = list(params)
        named = {name for value in params.values() if isinstance(value, dict) for name in value}
        for name in named or {_ALONE}:  # the kernel checks its parameters itself
            self._applied(name, torch.zeros(1, 1, 1), np.eye(4), self._params_of(name))
        vars(self).update(_plain(params))

    @staticmethod
    def on_grid(params: Params, affine: NDArray[np.float64]) -> Params:
        """Return the kernel's arguments for an image with this affine."""
        return params

    def _params_of(self, name: str) -> Params:
        values = {parameter: getattr(self, parameter) for parameter in self.args_names}
        try:
            return {p: v[name] if isinstance(v, dict) else v for p, v in values.items()}
        except KeyError:
            given = sorted({key for v in values.values() if isinstance(v, dict) for key in v})
            raise ValueError(f"{self.name} has parameters for the images {given}, none for {name!r}") from None

    def _choose(self, names: list[str]) -> Callable[[str], Params] | None:
        if self.probability < 1 and torch.rand(1).item() >= self.probability:
            return None
        return self._params_of

    def _recorded(self, names: list[str], chosen: Callable[[str], Params]) -> Params:
        return {parameter: _plain(getattr(self, parameter)) for parameter in self.args_names}


class RandomArtifact(_Transform, RandomTransform):
    """An artifact whose parameters are drawn at each call.

    A call draws one integer from torch's default generator, so that `torch.manual_seed` and a DataLoader's seeds
    govern it, and draws everything from a numpy generator of that.

    Args:
        shared: The same parameters for all images of a subject, a noise's seed included.
        correlation: Of the parameters between the images of a subject, in [0, 1]: 0 independent, 1 equal, as for
            two visits on one scanner. Noise seeds differ all the same.
        seed: Replaces the integer: every call draws the same.
        **kwargs: Of `torchio.Transform`: `p`, `copy`, `include`, `exclude`, `keep`, ...

    Raises:
        ValueError: A parameter outside its range; names parameter, value and range.
    """

    identity: ClassVar[dict[str, float]] = {}
    """The parameters that `softened` moves, and their values that change nothing."""

    def __init__(
        self, *, shared: bool = False, correlation: float = 0.0, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.shared = bool(shared)
        self.correlation = check_number("correlation", correlation, least=0, most=1)
        self.seed = None if seed is None else int(check_number("seed", seed, least=0, most=2**63 - 1, whole=True))

    @abstractmethod
    def draw_params(self, rng: np.random.Generator) -> Params:
        """Draw the twin's parameters, as plain JSON.

        Whatever belongs to the scanner comes from `rng.random`, which `correlation` ties together; a seed comes from
        `rng.integers`, which stays independent.
        """

    def _choose(self, names: list[str]) -> Callable[[str], Params] | None:
        seed = int(torch.randint(2**63 - 1, (1,)).item()) if self.seed is None else self.seed
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        if self.probability < 1 and rng.random() >= self.probability:
            return None
        if self.shared:
            same = self.draw_params(rng)
            return lambda name: same
        if self.correlation:
            by_name = {name: self.draw_params(_Correlated(seed, n, self.correlation)) for n, name in enumerate(names)}
        else:
            by_name = {name: self.draw_params(rng) for name in names}
        return by_name.__getitem__

    def _recorded(self, names: list[str], chosen: Callable[[str], Params]) -> Params:
        if self.shared or names == [_ALONE]:
            return dict(chosen(names[0]))
        first = chosen(names[0])
        return {parameter: {name: chosen(name)[parameter] for name in names} for parameter in first}


class _Correlated(np.random.Generator):
    """A generator whose `random` shares part of its draws with those of the same seed (a Gaussian copula)."""

    def __init__(self, seed: int, number: int, correlation: float, part: tuple[int, ...] = ()) -> None:
        super().__init__(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(1 + number, *part))))
        self._common = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, *part)))
        self._seed, self._number, self._correlation = seed, number, correlation

    def part(self, part: int) -> _Correlated:
        """Return the generator of one part of a draw."""
        return _Correlated(self._seed, self._number, self._correlation, (part,))

    def random(self, size: Any = None, *_: Any, **__: Any) -> Any:
        from scipy.special import ndtr

        common, own = self._common.standard_normal(size), self.standard_normal(size)
        c = self._correlation
        mixed = ndtr(np.sqrt(c) * common + np.sqrt(1 - c) * own)
        return np.minimum(mixed, 1 - 2.0**-53)


def part_of(rng: np.random.Generator, part: int) -> np.random.Generator:
    """Return what a part of a draw is drawn from: where images are alike, a generator for each part.

    What one image's other parts have drawn then does not decide which numbers it shares with another image.
    """
    return rng.part(part) if isinstance(rng, _Correlated) else rng


def _called(name: str) -> str:
    return "" if name == _ALONE else f"image '{name}': "


def _plain(value: Any) -> Any:
    """Return a copy in which arrays are lists: history is JSON."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic, Tensor)) else value
