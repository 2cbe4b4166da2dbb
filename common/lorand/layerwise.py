"""A replica without a copy of the weights: each layer's are made as it runs, from the base."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lorand.directions import Pool
from lorand.errors import ModelError
from lorand.kernels import Backend, backend_for
from lorand.layers import Absent, Layer, blocks, intercept, layers
from lorand.manifest import Manifest
from lorand.recompute import recomputed
from lorand.replica import OnGradient, Replica, check_tensors, hand_over

ALIGNMENT = 64
"""Bytes: where a tensor begins in the scratch memory, as an allocator would place it."""


class Stored(Protocol):
    """Base weights that are kept in another form than a layer computes with."""

    def dense(self) -> torch.Tensor:
        """Return w0 in the manifest's dtype; made anew at each call."""


class LayerwiseReplica(Replica):
    """The model's own parameters are the base weights; w(A) exists for one layer at a time.

    Peak memory is that of inference and the largest layer (`lorand.layers.layers`). Backward passes
    keep the layers' inputs and run each layer again (`lorand.recompute`), so that there is never
    a whole gradient. Outside of its layer a weight is `Absent`: a model that uses one there gets
    ModelError, not wrong numbers.

    The replica takes over the module's parameters: those it makes anew are emptied. `stored` holds
    base weights that the module has only stand-ins for. Parameters on another device than `device`
    stay there, page-locked, and are brought over layer by layer.
    """

    def __init__(
        self,
        module: nn.Module,
        manifest: Manifest,
        pool: Pool,
        backend: Backend | None = None,
        *,
        stored: Mapping[str, Stored] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Take over the parameters. Raises ModelError when they are not the manifest's."""
        parameters = dict(module.named_parameters())
        check_tensors(parameters, manifest)
        device = device or next(iter(parameters.values())).device
        super().__init__(manifest, pool, backend or backend_for(device))
        self._bases: dict[str, torch.Tensor | Stored] = dict(stored or {})
        self._scratch = _Scratch(device)
        self._on_gradient: OnGradient | None = None
        for name, parameter in parameters.items():
            if name not in self._bases and parameter.device != device:
                self._bases[name] = parameter.detach().pin_memory()
            elif name not in self._bases and name in self._places:
                self._bases[name] = parameter.detach()
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)
        self._take_over(module, parameters, device)

    def settle(self) -> None:
        """See Replica: there is nothing to write before a layer runs."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See Replica."""
        for spec in self.manifest.tensors:
            like = self._absent[spec.name]
            with self._scratch.take(like.nbytes) as memory:
                out = _placed(memory, 0, like)
                self._make({spec.name: out})
                yield spec.name, out

    def _fold(self) -> None:
        for spec in self.manifest.tensors:
            base = self._bases[spec.name]
            if not isinstance(base, torch.Tensor):
                raise ModelError(
                    f"{spec.name!r} is kept quantised and cannot move to another pool; set "
                    'model.quantisation = "none"'
                )
        for name, weights in self.weights():
            base = self._bases[name]
            assert isinstance(base, torch.Tensor)
            base.copy_(weights)

    def on_gradient(self, call: OnGradient) -> None:
        """See Replica."""
        self._on_gradient = call
        self._scratch.thrifty = True  # at its peak, a backward pass wants the memory for gradients

    def _take_over(
        self, module: nn.Module, parameters: Mapping[str, torch.Tensor], device: torch.device
    ) -> None:
        """Put stand-ins in the places of all tensors that are made, and step into their layers."""
        self._absent = {
            name: Absent.of(name, parameter, device)
            for name, parameter in parameters.items()
            if name in self._bases
        }
        inside = {id(block) for block in blocks(module).values()}
        for layer in layers(module):
            made = Layer(layer.module, tuple(s for s in layer.slots if s.name in self._absent))
            for slot in made.slots:
                if isinstance(slot.holder, nn.RNNBase):
                    raise ModelError(
                        f"{slot.name!r} belongs to a recurrent layer, which keeps its weights in "
                        "a list of its own; join with `--weights copy`"
                    )
                slot.put(self._absent[slot.name])
            if made.slots or id(layer.module) in inside:
                self._step_into(made)
        for name in self._absent:
            if not isinstance(parameters[name], Absent):
                # Whoever still holds the parameter itself gets an error, not base weights.
                parameters[name].data = parameters[name].data.new_empty(0)

    def _step_into(self, layer: Layer) -> None:
        trained = any(slot.name in self._places for slot in layer.slots)
        is_lookup = (
            type(layer.module).forward is nn.Embedding.forward and layer.module.max_norm is None
        )

        @contextmanager
        def made(leaves: bool) -> Iterator[None]:
            # The gradient of a table does not depend on its content.
            tensors = self._blank if leaves and is_lookup else self._made
            with tensors(layer) as weights:
                if leaves:
                    weights = {name: self._leaf(name, w) for name, w in weights.items()}
                before = [slot.put(weights[slot.name]) for slot in layer.slots]
                try:
                    yield
                finally:
                    for slot, tensor in zip(layer.slots, before, strict=True):
                        slot.put(tensor)

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                return pytree.tree_map(self._scratch.released, forward(*args, **kwargs))

            if torch.is_grad_enabled():
                trains = trained and self._on_gradient is not None
                return recomputed(made, run, args, kwargs, trains=trains)
            with made(False):
                return run(*args, **kwargs)

        intercept(layer.module, around)

    @contextmanager
    def _made(self, layer: Layer) -> Iterator[dict[str, torch.Tensor]]:
        """The layer's weights as they should be now, in memory that the next layer uses again."""
        names = sorted({slot.name for slot in layer.slots})
        ends = list(accumulate(_aligned(self._absent[name].nbytes) for name in names))
        if not names:
            yield {}
            return
        with self._scratch.take(ends[-1]) as memory:
            weights = {
                name: _placed(memory, start, self._absent[name])
                for name, start in zip(names, [0, *ends[:-1]], strict=True)
            }
            self._make(weights)
            yield weights

    def _make(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Write these tensors as they should be now: those with a plain base in one walk."""
        targets = []
        for name, out in weights.items():
            base = self._bases[name]
            if not isinstance(base, torch.Tensor):
                out.copy_(base.dense())
                base = out
            elif base.device != out.device or name not in self._places:
                base = out.copy_(base, non_blocking=True)
            if name in self._places:
                targets.append(self._target(name, base, out))
        self._write(targets)

    @contextmanager
    def _blank(self, layer: Layer) -> Iterator[dict[str, torch.Tensor]]:
        """Zeros in the shape of the layer's weights, in no memory."""
        likes = [self._absent[slot.name] for slot in layer.slots]
        yield {
            like.parameter: torch.zeros(1, dtype=like.dtype, device=like.device).expand(like.shape)
            for like in likes
        }

    def _leaf(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        """The same values as a leaf of the graph, whose gradient is handed over."""
        if name not in self._places or self._on_gradient is None:
            return weights
        leaf = weights.detach().requires_grad_(True)
        hand_over(name, leaf, self._on_gradient)
        return leaf


class _Scratch:
    """Memory for the weights of the layer that runs, kept for the next one.

    `thrifty` gives it back where the next one needs less than half of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.thrifty = False
        self._device = device
        self._spare: torch.Tensor | None = None
        self._taken: list[int] = []

    @contextmanager
    def take(self, nbytes: int) -> Iterator[torch.Tensor]:
        """Lend at least so many bytes, shape (bytes,)."""
        memory, self._spare = self._spare, None
        most = 2 * nbytes if self.thrifty else math.inf
        if memory is None or not nbytes <= memory.nbytes <= most:
            memory = None  # gone before there is another
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._taken.append(memory.untyped_storage().data_ptr())
        try:
            yield memory
        finally:
            self._taken.pop()
            self._spare = memory

    def released(self, result: Any) -> Any:
        """Return a layer's result, copied where it is a view of the layer's weights."""
        if not isinstance(result, torch.Tensor) or not result.numel():
            return result
        return result.clone() if result.untyped_storage().data_ptr() in self._taken else result


def _placed(memory: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
