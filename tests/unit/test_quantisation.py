"""A quantised base: w0 is what it is dequantised to, however the weights are kept."""

import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from tests import tiny
from torch import nn

from lorand.config import ModelSection, Quantisation
from lorand.errors import HandshakeError, ModelError
from lorand.layers import Absent
from lorand.manifest import Identity
from lorand_worker import guard, model, quantisation
from lorand_worker.bench import load_base, task_for
from lorand_worker.data import Examples
from lorand_worker.estimators import build
from lorand_worker.memory import Weights
from lorand_worker.quantisation import Quantised, quantise, quantise_layers

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: Final[list[Quantisation]] = ["int8", "nf4"]
DTYPES: Final = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _library() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def matrix(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) / 30).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(96, 64), (5, 34), (1, 64)])
def test_dequantised_weights_are_near_and_repeat(
    kind: Quantisation, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = matrix(*shape, dtype)
    stored = quantise(weight, kind)
    dense = stored.dense()
    assert (dense.shape, dense.dtype) == (weight.shape, dtype)
    assert torch.equal(dense, stored.dense())
    largest = float(weight.abs().max())
    assert float((dense - weight).abs().max()) <= largest * (0.16 if kind == "nf4" else 0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_stays_zero(kind: Quantisation) -> None:
    assert quantise(torch.zeros(4, 64), kind).dense().tolist() == torch.zeros(4, 64).tolist()


def test_nf4_takes_four_and_a_half_bits_a_weight() -> None:
    stored = quantise(matrix(256, 256, torch.float32), "nf4")
    assert stored.codes.nbytes + stored.scales.absmax.nbytes == 256 * 256 * 4.5 / 8
    assert quantise(matrix(256, 256, torch.float32), "int8").codes.nbytes == 256 * 256


def test_linear_layers_of_the_blocks_are_quantised_and_nothing_else(tiny_model: Path) -> None:
    loaded = model.load(ModelSection(name="x", quantisation="nf4"), 2, tiny_model)
    absent = {n for n, p in loaded.module.named_parameters() if isinstance(p, Absent)}
    assert absent == set(loaded.stored)
    matrices = {n for n, p in loaded.module.named_parameters() if p.dim() == 2 and "layer." in n}
    assert absent == matrices, "no bias, norm, embedding or head"


def test_the_turned_matrices_of_gpt2_count_as_linear() -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    assert len(quantise_layers(transformers.GPT2Model(config), "int8")) == 4


def test_odd_rows_stay_as_they_are() -> None:
    module = nn.ModuleList([nn.Linear(6, 4), nn.Linear(7, 4)])
    assert list(quantise_layers(module, "nf4")) == ["0.weight"]


def test_a_model_without_blocks_cannot_be_quantised() -> None:
    with pytest.raises(ModelError, match=r'model\.quantisation = "nf4" needs a model with linear'):
        quantise_layers(nn.Linear(4, 4), "nf4")
    assert quantise_layers(nn.Linear(4, 4), "none") == {}


def test_without_the_library_it_says_what_to_install(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("bitsandbytes")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"pip install 'lorand\[quantised\]'"):
        model.load(ModelSection(name="x", quantisation="int8"), 2, tiny_model)


# ------------------------------------------------------------- identity


def identity_of(folder: Path, quantisation: Quantisation, dtype: str = "float32") -> Identity:
    config = tiny.config("spsa", model={"quantisation": quantisation, "dtype": dtype})
    return load_base(config, folder, "cpu", Weights.LAYERWISE).identity


def test_the_base_digest_is_over_dequantised_values(tiny_model: Path) -> None:
    """Another library's rounding would be another base: refused at join, not diverging later."""
    config = tiny.config("spsa", model={"quantisation": "nf4"})
    loaded = model.load(config.model, 2, tiny_model)
    ours = model.identity(loaded, config)
    quantisation.expand(loaded.module, loaded.stored)
    assert model.base_digest(loaded.module) == ours.base_digest
    other = model.load(config.model, 2, tiny_model)
    name, weight = next(iter(other.stored.items()))
    moved = torch.nextafter(weight.dense(), torch.tensor(9.0))

    class OtherLibrary(Quantised):
        def dense(self) -> torch.Tensor:
            return moved

    other.stored[name] = OtherLibrary(weight.codes, weight.scales, weight.dtype)
    with pytest.raises(HandshakeError, match="base weights here"):
        guard.check_identity(model.identity(other, config), ours)


def test_every_quantisation_is_another_base_with_the_same_tensors(tiny_model: Path) -> None:
    identities = [identity_of(tiny_model, kind) for kind in ("none", "int8", "nf4")]
    assert len({identity.base_digest for identity in identities}) == 3
    assert len({identity.manifest.digest() for identity in identities}) == 1


# ------------------------------------------------------------- measuring on it


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trainable", ["all", "last:1"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_over_a_quantised_base_are_a_copy_of_the_dequantised_one(
    tiny_model: Path, kind: Quantisation, trainable: str, dtype: str
) -> None:
    """Zeroth-order scalars, losses and digests, bit for bit; the same gradients."""
    rows = tiny.rows("hotels", 8, seed=3)
    examples = Examples(tuple(t for t, _ in rows), tuple(tiny.LABELS.index(y) for _, y in rows))
    coefficients = np.random.default_rng(1).integers(-(2**24), 2**24, 256, dtype=np.int64)
    results: list[tuple[Any, ...]] = []
    gradients = []
    for weights in (Weights.COPY, Weights.LAYERWISE):
        section = {"quantisation": kind, "trainable": trainable, "dtype": dtype}
        config = tiny.config("spsa", model=section)
        base = load_base(config, tiny_model, "cpu", weights)
        base.replica.set(coefficients)
        task = task_for(base, config, examples)
        measured = build(config, base.replica, base.loaded.module).measure(
            task.loss, range(8), np.array([3, 99])
        )
        results.append((measured.values.tolist(), measured.loss, base.replica.digest()))
        config = tiny.config("backprop", model=section, directions={"pool_size": 256})
        estimator = build(config, base.replica, base.loaded.module)
        gradients.append(estimator.measure(task.loss, range(8), np.arange(256)).values)
    assert results[0] == results[1]
    scale = float(np.abs(gradients[0]).max())
    tolerance = 1e-5 if dtype == "float32" else 0.03
    np.testing.assert_allclose(gradients[1], gradients[0], atol=tolerance * scale, rtol=0)
