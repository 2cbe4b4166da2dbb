"""A small replica whose base weights every machine writes alike."""

from typing import Final

import numpy as np
import torch

from lorand.coefficients import Coefficients
from lorand.directions import Family, Pool
from lorand.manifest import Manifest, TensorSpec
from lorand.replica import DTYPES

FAMILIES: Final[list[Family]] = ["hadamard", "independent"]
KEY: Final = (0x9ABCDEF0, 0x12345678)
MANIFEST: Final = Manifest(
    (
        TensorSpec("a.weight", (70, 63), "float32"),
        TensorSpec("b.bias", (300,), "bfloat16", 4),
        TensorSpec("b.weight", (5, 7, 11), "float16", -2),
        TensorSpec("c.scale", (), "float32"),
    )
)


def tensors_of(manifest: Manifest = MANIFEST, *, zero: bool = False) -> dict[str, torch.Tensor]:
    """Base weights that every machine writes alike, without a random generator."""
    tensors = {}
    for spec in manifest.tensors:
        steps = torch.arange(spec.size).reshape(spec.shape) * 37 % 251 - 125
        start = torch.zeros(spec.shape) if zero else steps / 1024
        tensors[spec.name] = start.to(DTYPES[spec.dtype])
    return tensors


def pool_of(family: Family = "hadamard", size: int = 64, quantum_exponent: int = 32) -> Pool:
    return Pool(KEY, size, quantum_exponent, family)


def random_coefficients(seed: int, size: int = 64) -> Coefficients:
    return np.random.default_rng(seed).integers(-(2**28), 2**28, size, dtype=np.int64)
