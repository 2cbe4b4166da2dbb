"""Compiled kernels are held against the definition before a process trusts them.

A compiler, a cache of compiled code or a processor can be wrong, and a wrong bit would part this
replica from all others. So the first use of a kernel on a dtype computes a few thousand weights
twice; a kernel that differs is not used.
"""

import logging
import time
from collections.abc import Callable

import numpy as np
import torch

from lorand.kernels import Backend, zero_sums
from lorand.kernels.reference import ReferenceBackend

WEIGHTS = 3 * 4096 + 77
"""Several tiles and blocks, and a tail."""
_KEYS = [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)]

log = logging.getLogger("lorand.kernels")


def pool_agrees(backend: Backend, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether materialise has the reference's bits and project its sums."""
    base = _weights(dtype, device)
    table = (np.arange(4096, dtype=np.float32) - 2000) * np.float32(2.0**-20)
    for size in (4096, 256):
        results = []
        for made in (backend, ReferenceBackend()):
            out = torch.empty_like(base)
            made.materialise(base, table[:size], out, key=(1, 2), tid=3)
            sums = zero_sums(size, device)
            made.project(base, sums, key=(1, 2), tid=3)
            results.append((out, sums))
        (out, sums), (expected, expected_sums) = results
        if not torch.equal(out, expected) or not torch.allclose(sums, expected_sums, atol=1e-6):
            return False
    return True


def independent_agrees(backend: Backend, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether materialise_independent has the reference's bits."""
    base = _weights(dtype, device)
    results = []
    for made in (backend, ReferenceBackend()):
        out = torch.empty_like(base)
        amounts = np.array([5, -(2**40), 77, 2**20 + 1, -3])
        made.materialise_independent(base, _KEYS, amounts, out, tid=3, exponent=-44)
        results.append(out)
    return torch.equal(*results)


class Trust:
    """Remembers, for this process, which kernels agree with the definition."""

    def __init__(self, name: str, compiled: Callable[[], bool]) -> None:
        """`compiled` tells whether compiled code of an earlier process is at hand."""
        self._name = name
        self._compiled = compiled
        self._known: dict[tuple[str, torch.dtype], bool] = {}

    def of(self, backend: Backend, family: str, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether this kernel may be used; the first call compiles, checks and says so."""
        place = (family, dtype)
        if place not in self._known:
            self._known[place] = True  # the check itself calls the kernel
            self._known[place] = self._check(backend, family, dtype, device)
        return self._known[place]

    def _check(
        self, backend: Backend, family: str, dtype: torch.dtype, device: torch.device
    ) -> bool:
        what = f"the {self._name} kernels for {str(dtype).removeprefix('torch.')} ({family})"
        if not self._compiled():
            log.info("compiling %s: some seconds, once on this machine", what)
        began = time.monotonic()
        agrees = {"hadamard": pool_agrees, "independent": independent_agrees}[family]
        good = agrees(backend, dtype, device)
        log.debug("%s were ready after %.1f s", what, time.monotonic() - began)
        if not good:
            log.error(
                "%s do not give the bits of the definition on this processor; the slow reference"
                " is used instead. Delete the cache of compiled code (NUMBA_CACHE_DIR or"
                " lorand/kernels/__pycache__, for a GPU TRITON_CACHE_DIR) and start again; please"
                " report it if it remains",
                what,
            )
        return good


def _weights(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers of a usual size, exact in every dtype, with a subnormal one."""
    weights = ((torch.arange(WEIGHTS) * 37 % 251) - 125) * 2.0**-9
    weights[5] = 2.0**-133
    return weights.to(dtype).to(device)
