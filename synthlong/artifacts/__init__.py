"""MRI artifacts: plain functions on tensors, and TorchIO transforms around them, the fastest there are."""

from synthlong.artifacts.acquisition import Acquisition, RandomAcquisition, acquire
from synthlong.artifacts.base import Artifact, RandomArtifact
from synthlong.artifacts.bias_field import PolynomialBiasField, RandomPolynomialBiasField, polynomial_bias_field
from synthlong.artifacts.blur import GaussianBlur, RandomGaussianBlur, gaussian_blur
from synthlong.artifacts.downsampling import (
    AnisotropicDownsampling,
    RandomAnisotropicDownsampling,
    anisotropic_downsampling,
)
from synthlong.artifacts.ghosting import KSpaceGhosting, RandomKSpaceGhosting, kspace_ghosting
from synthlong.artifacts.motion import KSpaceMotion, RandomKSpaceMotion, kspace_motion
from synthlong.artifacts.noise import GaussianNoise, RandomGaussianNoise, gaussian_noise
from synthlong.artifacts.slices import RandomSliceThickness, SliceThickness, slice_thickness
from synthlong.artifacts.spike import KSpaceSpike, RandomKSpaceSpike, kspace_spike
from synthlong.artifacts.unsharp import RandomUnsharpMask, UnsharpMask, unsharp_mask

__all__ = [
    "Acquisition",
    "AnisotropicDownsampling",
    "Artifact",
    "GaussianBlur",
    "GaussianNoise",
    "KSpaceGhosting",
    "KSpaceMotion",
    "KSpaceSpike",
    "PolynomialBiasField",
    "RandomAcquisition",
    "RandomAnisotropicDownsampling",
    "RandomArtifact",
    "RandomGaussianBlur",
    "RandomGaussianNoise",
    "RandomKSpaceGhosting",
    "RandomKSpaceMotion",
    "RandomKSpaceSpike",
    "RandomPolynomialBiasField",
    "RandomSliceThickness",
    "RandomUnsharpMask",
    "SliceThickness",
    "UnsharpMask",
    "acquire",
    "anisotropic_downsampling",
    "gaussian_blur",
    "gaussian_noise",
    "kspace_ghosting",
    "kspace_motion",
    "kspace_spike",
    "polynomial_bias_field",
    "slice_thickness",
    "unsharp_mask",
]
