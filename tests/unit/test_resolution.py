"""Which perturbations move weights at all, against moving them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny

from lorand.errors import ConfigError
from lorand_worker.bench import load_base
from lorand_worker.memory import Weights
from lorand_worker.resolution import check_perturbation, smallest_moves

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weights", [Weights.COPY, Weights.LAYERWISE])
def test_weights_move_from_the_smallest_move_on(
    tiny_model: Path, dtype: str, weights: Weights
) -> None:
    """The share that moves is counted on the weights themselves, head and its scale included."""
    config = tiny.config("spsa", model={"dtype": dtype, "trainable": "last:1"})
    replica = load_base(config, tiny_model, "cpu", weights).replica
    needed, counts = smallest_moves(replica)
    assert counts.sum() == pytest.approx(replica.manifest.num_weights)
    before = {name: tensor.clone() for name, tensor in replica.weights()}
    for quanta in (3 * 2**6, 3 * 2**13, 3 * 2**19, 3 * 2**22):
        moved = 0.0
        for sign in (1, -1):
            with replica.perturbed(3, sign * quanta):
                for name, tensor in replica.weights():
                    moved += float(torch.count_nonzero(tensor != before[name])) / 2
        scale = quanta * 2.0**-config.directions.quantum_exponent
        predicted = float(np.sum(counts[needed < scale]))
        assert moved == pytest.approx(predicted, abs=0.05 * counts.sum())


@pytest.mark.parametrize("kind", ["forward", "backprop"])
def test_exact_slopes_perturb_nothing(tiny_model: Path, kind: Any) -> None:
    settings = {"perturbation_scale": 1e-9}
    config = tiny.config(kind, model={"dtype": "bfloat16"}, estimator=settings)
    check_perturbation(config, load_base(config, tiny_model, "cpu").replica)
    other = tiny.config("one-sided", model={"dtype": "bfloat16"}, estimator=settings)
    with pytest.raises(ConfigError, match=r"rounds away in [0-9]{2,3}% of the trained bfloat16"):
        check_perturbation(other, load_base(other, tiny_model, "cpu").replica)
