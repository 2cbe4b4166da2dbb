"""A trained linear head on a frozen model: its inputs are computed once, and passes are products.

Nothing of the model but the head runs in a round. tests/unit/test_private_runs.py compares with
the library's own estimators.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from experiments.head_inputs import Labelled, head_of, inputs, scored_by
from experiments.private_runs import Bench
from lorand.codec import Floats
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.replica import CopyReplica
from lorand_worker.data import Examples
from lorand_worker.model import LoadedModel
from lorand_worker.tasks import Score


class Directions:
    """All directions of a run on a head, as columns: an example's vectors are products with them.

    They are the library's up to the last bits of float32, which is all that differs.
    """

    def __init__(self, head: nn.Linear, replica: CopyReplica, scale: float) -> None:
        """Take the directions of the replica's pool; `scale` is how far zeroth order looks."""
        self._head, self._replica, self._scale = head, replica, scale
        columns = [replica.direction(index) for index in range(replica.pool.size)]
        self._weight = torch.stack([column["head.weight"] for column in columns], dim=2)
        self._bias = torch.stack([column["head.bias"] for column in columns], dim=1)

    @torch.no_grad()
    def sketches(self, part: Labelled) -> torch.Tensor:
        """Return Zᵀ∇L of each example, shape (examples, K), as `Backprop.each` does.

        An example's gradient is (p − y) ⊗ (x, 1): softmax less label, times the input.
        """
        self._replica.settle()
        x, labels = part
        logits: torch.Tensor = self._head(x)
        residual = logits.softmax(dim=1) - functional.one_hot(labels, logits.shape[1])
        outer = residual[:, :, None] * x[:, None, :]
        return outer.flatten(1) @ self._weight.flatten(0, 1) + residual @ self._bias

    @torch.no_grad()
    def differences(self, part: Labelled, indices: Indices) -> torch.Tensor:
        """Return (L(w + μz) − L(w − μz)) / 2μ, shape (examples, n), as `Spsa.each` does."""
        self._replica.settle()
        x, labels = part
        at = torch.from_numpy(indices)
        here = self._head(x)[:, :, None]
        moved = torch.einsum("ew,cwn->ecn", x, self._weight[:, :, at]) + self._bias[:, at]
        targets = labels[:, None].expand(-1, len(indices))
        above, below = (
            functional.cross_entropy(here + step * moved, targets, reduction="none")
            for step in (self._scale, -self._scale)
        )
        return (above.double() - below.double()) / (2 * self._scale)


def bench(
    config: RunConfig,
    loaded: LoadedModel,
    replica: CopyReplica,
    shards: Sequence[Examples],
    scored: Examples,
) -> Bench:
    """Return the bench of a run that trains the head alone."""
    parts = [inputs(loaded, shard, config.model) for shard in shards]
    x, labels = inputs(loaded, scored, config.model)
    head = head_of(loaded)

    @torch.no_grad()
    def score() -> Score:
        replica.settle()
        return scored_by(head, (x, labels))

    scale = config.perturbation_quanta * 2.0**-config.directions.quantum_exponent
    directions = Directions(head, replica, scale)

    def vectors(worker: int, batch: Sequence[int], indices: Indices) -> Floats:
        part = parts[worker][0][list(batch)], parts[worker][1][list(batch)]
        if config.estimator.kind == "backprop":
            found = directions.sketches(part)[:, torch.from_numpy(indices)]
        else:
            found = directions.differences(part, indices)
        values: Floats = found.double().numpy()
        return values

    return Bench(vectors, score)
