"""Linear layers that add what their weights are away: the losses of written weights, same bits."""

from typing import Any, Final

import numpy as np
import pytest
import torch
from tests import runs
from torch import nn

from lorand.errors import LedgerError
from lorand.ledger import pool_of
from lorand.manifest import Identity, Manifest, TensorSpec
from lorand.replica import settling
from lorand.subspaces import factored
from lorand.subspaces.basis import Kind, drawn
from lorand.subspaces.factored import LinearLayers, added, pays
from lorand.subspaces.lifts import Cosine, lift
from lorand.subspaces.replica import SubspaceReplica
from lorand_worker import estimators
from lorand_worker.precision import Precision, passes

pytestmark = pytest.mark.usefixtures("one_thread")

QUANTA: Final = 1 << 24  # 2^-8 of an unscaled direction
SHAPES: Final = ((24, 16), (16, 24), (16, 16), (40, 33))


class Block(nn.Module):
    """A square layer without a bias, one that widens and one that narrows."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16, bias=False)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = torch.tanh(self.up(x + self.mix(x)))
        result: torch.Tensor = x + self.down(input=hidden)
        return result


class Model(nn.Module):
    """Tied embedding and decoder, two blocks, one layer that is only read, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)
        self.decoder.weight = self.embedding.weight
        self.blocks = nn.ModuleList([Block(), Block()])
        self.read = nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        x = nn.functional.linear(self.norm(x), self.read.weight, self.read.bias)
        result: torch.Tensor = self.head(x).logsumexp(-1) + self.decoder(x).std(-1)
        return result


LAYERS: Final = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("mix", "up", "down")} | {
    "head.weight"
}


def built(kind: Kind = "dct") -> tuple[Model, SubspaceReplica]:
    """A model and its replica, with head, embedding, blocks and biases in its directions."""
    torch.manual_seed(3)
    module = Model().eval().requires_grad_(False)
    specs = [
        TensorSpec(name, tuple(p.shape), "float32", len(name) % 3, 4 if p.dim() == 2 else 0)
        for name, p in module.named_parameters()
    ]
    manifest = Manifest(tuple(sorted(specs, key=lambda spec: spec.name)))
    config = runs.config_of(
        subspace={"kind": kind, "rank": 4, "refresh_every": 64}, directions={"rotate_every": 16}
    )
    pool = pool_of(config, Identity(b"\1" * 32, b"\2" * 32, manifest), 0)
    return module, SubspaceReplica.of(module, manifest, pool)


def written(module: Model, replica: SubspaceReplica) -> tuple[Model, SubspaceReplica]:
    """Another model on the same base weights whose replica always writes them."""
    other = Model().eval().requires_grad_(False)
    other.load_state_dict(module.state_dict())
    tensors = dict(other.named_parameters())
    return other, settling(other, SubspaceReplica(tensors, replica.manifest, replica.pool))


def coefficients(seed: int) -> Any:
    return np.random.default_rng(seed).integers(-(2**22), 2**22, 64, dtype=np.int64)


def ids(*shape: int) -> torch.Tensor:
    return torch.arange(int(np.prod(shape))).reshape(shape) * 7 % 30


def loss(module: nn.Module, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return float(module(tokens).double().mean())


def mean_loss(module: nn.Module) -> estimators.Loss:
    return lambda batch: torch.as_tensor(module(ids(1, len(batch)))).mean()


def learn(module: Model, replica: SubspaceReplica, tokens: torch.Tensor, seed: int = 1) -> None:
    """One round, after which the replica knows how many tokens a loss has."""
    with replica.perturbed(3, QUANTA):
        loss(module, tokens)
    replica.set(coefficients(seed))


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in module.modules())


# -- one layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-3, 0, 4])
@pytest.mark.parametrize("x", [(16,), (1, 16), (0, 16), (5, 3, 16), (2, 3, 4, 16)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_the_lift(shape: tuple[int, int], x: tuple[int, ...], exponent: int) -> None:
    spec = TensorSpec("w", shape, "float32", exponent, 4)
    source = torch.Generator().manual_seed(2)
    weight = torch.randn(shape, generator=source)
    part = lift(weight, spec, 0, drawn("dct", Manifest((spec,)), (1, 2)))
    assert isinstance(part, Cosine)
    size = (shape[0], 4) if shape[0] >= shape[1] else (4, shape[1])
    away = torch.randn(size, generator=source) * 2.0**-8
    left, right = part.factors(away)
    assert (left.shape, right.shape) == ((shape[0], 4), (4, shape[1]))
    assert torch.allclose(left @ right, part.lifted(away), rtol=1e-5, atol=1e-6)
    inputs = torch.randn((*x[:-1], shape[1]), generator=source)
    bias = torch.randn(shape[0], generator=source)
    plain = nn.functional.linear(inputs, weight, bias)
    moved = nn.functional.linear(inputs, weight + part.lifted(away), bias)
    assert torch.allclose(added(plain, inputs, (left, right)), moved, rtol=1e-4, atol=1e-4)


def test_a_term_on_bfloat16_outputs_is_rounded_once_and_keeps_their_dtype() -> None:
    torch.manual_seed(0)
    x, left, right = torch.randn(6, 8), torch.randn(5, 2), torch.randn(2, 8)
    output = torch.randn(6, 5).bfloat16()
    with passes(Precision.BFLOAT16, torch.device("cpu")):
        result = added(output, x, (left, right))
    assert torch.equal(result, (output.float() + x @ right.T @ left.T).bfloat16())


def test_it_pays_up_to_so_many_tokens_a_column() -> None:
    limit = int(factored.TOKENS_A_COLUMN * 384)
    assert pays(limit, (1536, 384))
    assert pays(limit, (384, 1536))
    assert not pays(limit + 1, (1536, 384))
    assert not pays(0, (384, 384))


def test_only_plain_float32_layers_with_weights_of_their_own_are_taken() -> None:
    class Other(nn.Linear):
        """One that may compute something else."""

    module = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "other": Other(4, 4),
            "short": nn.Linear(4, 4, dtype=torch.bfloat16),
            "twice": nn.Linear(4, 4),
            "again": nn.Linear(4, 4),
            "unasked": nn.Linear(4, 4),
        }
    )
    module["again"].weight = module["twice"].weight
    names = {name for name, _ in module.named_parameters() if "unasked" not in name}
    assert set(LinearLayers.of(module, names)._layers) == {"plain.weight"}
    module["place"] = module["plain"]  # one layer in two places has one holder
    assert set(LinearLayers.of(module, names)._layers) == {"plain.weight"}


# -- replicas --------------------------------------------------------------------------------------


def test_the_first_round_writes_and_the_next_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    module, replica = built()
    counts: list[str] = []
    usual = Cosine.write

    def write(self: Cosine, coordinates: torch.Tensor) -> None:
        counts.append(self.spec.name)
        usual(self, coordinates)

    monkeypatch.setattr(Cosine, "write", write)
    cosines = {name for name, part, *_ in replica.parts() if isinstance(part, Cosine)}
    assert cosines > LAYERS
    learn(module, replica, ids(1, 5))
    assert set(counts) == cosines
    assert replica._layers.chosen == LAYERS
    with replica.perturbed(3, QUANTA):  # what the live weights are is not known yet
        loss(module, ids(1, 5))
    for quanta in (QUANTA, -QUANTA):
        counts.clear()
        with replica.perturbed(3, quanta):
            loss(module, ids(1, 5))
        assert set(counts) == cosines - LAYERS
    counts.clear()
    loss(module, ids(1, 5))
    assert set(counts) == cosines  # w(A) itself is written, bit for bit


def test_weights_are_written_where_a_loss_has_many_tokens() -> None:
    module, replica = built()
    learn(module, replica, ids(4, 50))
    assert replica._layers.chosen == set()
    learn(module, replica, ids(1, 7))
    assert replica._layers.chosen == LAYERS - {"head.weight"}  # of 12 rows
    with replica.perturbed(3, QUANTA):  # four calls are one loss
        for row in ids(4, 3):
            loss(module, row)
    replica.set(coefficients(2))
    assert replica._layers.chosen == set()


@pytest.mark.parametrize("kind", ["dct", "coordinate"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5,), (2, 3), (3, 40)], ids=str)
def test_losses_are_those_of_written_weights(kind: Kind, shape: tuple[int, ...]) -> None:
    module, replica = built(kind)
    plain, reference = written(module, replica)
    learn(module, replica, ids(*shape))
    reference.set(coefficients(1))
    for turn in range(3):
        base = loss(plain, ids(*shape))
        for index, quanta in ((3, QUANTA), (3, -QUANTA), (60, QUANTA)):
            with replica.perturbed(index, quanta), reference.perturbed(index, quanta):
                got, expected = loss(module, ids(*shape)), loss(plain, ids(*shape))
            assert abs(expected - base) > 1e-4
            assert got == pytest.approx(expected, abs=5e-6)
        few = kind == "dct" and int(np.prod(shape)) <= 6
        assert replica._layers.chosen == (LAYERS if few else set())
        replica.set(coefficients(turn + 2))
        reference.set(coefficients(turn + 2))
        assert turn != 1 or replica.digest() == reference.digest()
    assert loss(module, ids(*shape)) == loss(plain, ids(*shape))
    assert replica.digest() == reference.digest()


def test_a_scalar_is_that_of_written_weights() -> None:
    module, replica = built()
    plain, reference = written(module, replica)
    config = runs.config_of(estimator={"kind": "spsa", "perturbation_scale": 2.0**-8})
    indices = np.array([1, 5, 40])
    for seed in (1, 2, 3):
        got, expected = (
            estimators.Spsa(one, config).measure(mean_loss(part), [0] * 5, indices)
            for one, part in ((replica, module), (reference, plain))
        )
        assert np.allclose(got.values, expected.values, rtol=0, atol=2e-3)
        assert np.abs(expected.values).max() > 0.05
        for one in (replica, reference):
            one.set(coefficients(seed))
    assert replica._layers.chosen == LAYERS


def test_bfloat16_passes_take_the_same_path() -> None:
    """Their weights round to three digits, and what is added does not: closer to float32."""
    module, replica = built()
    plain, reference = written(module, replica)
    tokens = ids(1, 5)
    learn(module, replica, tokens)
    reference.set(coefficients(1))
    for turn in range(2):
        with replica.perturbed(3, QUANTA), passes(Precision.BFLOAT16, torch.device("cpu")):
            got = loss(module, tokens)
        with reference.perturbed(3, QUANTA):
            expected = loss(plain, tokens)
        assert replica._layers.active is False
        assert got == pytest.approx(expected, rel=0.02), turn
    assert replica._layers.chosen == LAYERS


def test_weights_that_are_asked_for_are_written() -> None:
    module, replica = built()
    plain, reference = written(module, replica)
    learn(module, replica, ids(1, 5))
    reference.set(coefficients(1))
    for quanta in (QUANTA, -QUANTA):
        with replica.perturbed(3, quanta), reference.perturbed(3, quanta):
            assert replica._layers.active is (quanta < 0)
            assert replica.digest() == reference.digest()
            assert replica._layers.active is False
            assert loss(module, ids(1, 5)) == loss(plain, ids(1, 5))
    assert replica.digest() == reference.digest()


def test_an_error_within_leaves_no_hook_and_the_weights_as_they_were() -> None:
    module, replica = built()
    learn(module, replica, ids(1, 5))
    before, expected = replica.digest(), loss(module, ids(1, 5))
    count = hooks(module)

    def fail() -> None:
        assert hooks(module) == count + len(LAYERS) + 1  # and the layer that is only read
        loss(module, ids(1, 5))
        raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError), replica.perturbed(3, QUANTA):
            fail()
        assert (hooks(module), replica._layers.active) == (count, False)
        assert loss(module, ids(1, 5)) == expected
    with pytest.raises(LedgerError), replica.perturbed(3, 2**62):
        pass
    assert (hooks(module), replica.digest()) == (count, before)


def test_hooks_of_others_see_the_perturbed_output() -> None:
    module, replica = built()
    plain, reference = written(module, replica)
    outputs: list[torch.Tensor] = []
    for model in (module, plain):
        model.blocks[1].get_submodule("up").register_forward_hook(
            lambda _layer, _inputs, output: outputs.append(output)
        )
    learn(module, replica, ids(1, 5))
    reference.set(coefficients(1))
    for quanta in (QUANTA, -QUANTA):
        outputs.clear()
        with replica.perturbed(3, quanta), reference.perturbed(3, quanta):
            loss(module, ids(1, 5))
            loss(plain, ids(1, 5))
        assert torch.allclose(outputs[0], outputs[1], rtol=0, atol=1e-5)


def test_weights_that_others_wrote_are_not_taken_for_known() -> None:
    module, replica = built()
    plain, reference = written(module, replica)
    learn(module, replica, ids(1, 5))
    reference.set(coefficients(1))
    for write in (False, True):
        with replica.perturbed(3, QUANTA):
            loss(module, ids(1, 5))
        if write:
            replica.write_at(torch.ones_like(replica.coordinates()))
        else:
            replica.parameters["head.weight"].fill_(1.0)
        replica.disturbed()
        with replica.perturbed(3, -QUANTA), reference.perturbed(3, -QUANTA):
            assert loss(module, ids(1, 5)) == loss(plain, ids(1, 5))


def test_the_next_pool_begins_with_the_same_bits() -> None:
    module, replica = built()
    plain, reference = written(module, replica)
    config = runs.config_of(
        subspace={"kind": "dct", "rank": 4, "refresh_every": 16}, directions={"rotate_every": 16}
    )
    identity = Identity(b"\1" * 32, b"\2" * 32, replica.manifest)
    learn(module, replica, ids(1, 5))
    for number in (1, 2):
        with replica.perturbed(3, QUANTA):
            loss(module, ids(1, 5))
        pool = pool_of(config, identity, number)
        for one in (replica, reference):
            one.fold(coefficients(number), pool)
        with replica.perturbed(3, -QUANTA), reference.perturbed(3, -QUANTA):
            assert loss(module, ids(1, 5)) == pytest.approx(loss(plain, ids(1, 5)), abs=5e-6)
        assert replica.digest() == reference.digest()


def test_backward_passes_and_forward_gradients_run_on_written_weights() -> None:
    module, replica = built()
    plain, reference = written(module, replica)
    learn(module, replica, ids(1, 5))
    reference.set(coefficients(1))
    with replica.perturbed(3, QUANTA):
        loss(module, ids(1, 5))
    indices = np.arange(64)
    measured = [
        [
            estimator.measure(mean_loss(part), [0] * 5, indices)
            for estimator in (estimators.ForwardGradient(one, part), estimators.Backprop(one))
        ]
        for one, part in ((replica, module), (reference, plain))
    ]
    for got, expected in zip(*measured, strict=True):
        assert np.array_equal(got.values, expected.values)


def test_what_is_held_is_counted_as_kept() -> None:
    module, replica = built()
    before = replica.kept_bytes
    learn(module, replica, ids(1, 5))
    assert replica.kept_bytes == before
    with replica.perturbed(3, QUANTA):
        loss(module, ids(1, 5))
    assert replica.kept_bytes == before + 4 * replica.layout.size
