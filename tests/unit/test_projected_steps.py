"""Local steps in subspaces, against plain loops and against pytorch_optimizer's GaLore."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pytest
import torch
from tests import tiny
from torch import nn

from lorand.config import RunConfig
from lorand.errors import LedgerError
from lorand.ledger import pool_of
from lorand.manifest import Identity, Manifest, TensorSpec
from lorand.replica import CopyReplica, WholeReplica
from lorand.subspaces import elections
from lorand.subspaces.basis import Basis, Layout
from lorand.subspaces.elections import Elections
from lorand.subspaces.replica import SubspaceReplica
from lorand.subspaces.svd import Svd
from lorand.v1 import ledger_pb2 as pb
from lorand_worker import local_steps
from lorand_worker.estimators import NonFiniteLoss, Order
from lorand_worker.votes import vote

pytestmark = pytest.mark.usefixtures("one_thread")

POOL: Final = 256
RANK: Final = 3
INPUTS: Final = torch.from_numpy(np.random.default_rng(4).normal(0, 1, (40, 12))).float()
TARGETS: Final = torch.from_numpy(np.random.default_rng(5).normal(0, 1, (40, 8))).float()
MANIFEST: Final = Manifest(
    (
        TensorSpec("0.bias", (20,), "float32", 1),
        TensorSpec("0.weight", (20, 12), "float32", 1, RANK),
        TensorSpec("1.bias", (8,), "float32"),
        TensorSpec("1.weight", (8, 20), "float32", -1, RANK),
    )
)
IDENTITY: Final = Identity(b"\1" * 32, b"\2" * 32, MANIFEST)


def config_of(kind: str, pool: int = POOL, steps: int = 5, **local: Any) -> RunConfig:
    return tiny.config(
        "backprop",
        directions={"pool_size": pool, "head_scale": 1.0},
        subspace={"kind": kind, "rank": RANK},
        local={"steps": steps, "space": "weights", "optimizer": "SGD", "learning_rate": 0.1}
        | local,
        optimizer={"kind": "sgd", "learning_rate": 1.0, "normalise": False, "schedule": "constant"},
    )


class Made:
    """Two linear layers in a run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.module = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8))
        pool = pool_of(config, IDENTITY, 0)
        self.replica: WholeReplica
        if config.subspace.restricts:
            self.replica = SubspaceReplica.of(self.module, MANIFEST, pool)
        else:
            self.replica = CopyReplica.of(self.module, MANIFEST, pool)
        self.work = local_steps.build(config, self.replica, self.module)
        self.count = 0

    def loss(self, batch: Sequence[int]) -> torch.Tensor:
        rows = list(batch)
        value: torch.Tensor = ((self.module(INPUTS[rows]) - TARGETS[rows]) ** 2).mean()
        return value

    def batch(self) -> list[int]:
        self.count += 1
        return [(8 * self.count + i) % 40 for i in range(8)]

    def do(self) -> Any:
        return self.work.do(self.loss, self.batch, Order(np.arange(self.config.num_directions)), 40)


def plain_walk(config: RunConfig, basis: Basis) -> dict[str, torch.Tensor]:
    """Where SGD on the chosen columns leads, written out with masks on whole gradients."""
    made = Made(config_of("full"))
    start = {name: t.clone() for name, t in made.replica.live.items()}
    masks = {spec.name: torch.ones(spec.shape) for spec in MANIFEST.tensors}
    for tid, indices in basis.indices.items():
        spec = MANIFEST.tensors[tid]
        masks[spec.name].zero_()
        chosen: Any = (slice(None), indices) if spec.shape[0] >= spec.shape[1] else indices
        masks[spec.name][chosen] = 1.0
    weights = dict(made.module.named_parameters())
    for parameter in weights.values():
        parameter.requires_grad_(True)
    for _ in range(config.local.steps):
        for parameter in weights.values():
            parameter.grad = None
        batch = made.batch()
        value = ((made.module[1](made.module[0](INPUTS[batch])) - TARGETS[batch]) ** 2).mean()
        value.backward()
        with torch.no_grad():
            for name, parameter in weights.items():
                assert parameter.grad is not None
                parameter.sub_(config.local.learning_rate * masks[name] * parameter.grad)
        made.replica._stale = False  # what was written here is to stay
    return {name: parameter.detach() - start[name] for name, parameter in weights.items()}


def test_steps_in_shared_columns_are_masked_steps_and_are_reported_exactly() -> None:
    """q = 20 + 60 + 8 + 60 coordinates fit K = 256: the sum over the pool is where steps led."""
    config = config_of("coordinate")
    made = Made(config)
    assert isinstance(made.replica, SubspaceReplica)
    assert made.replica.layout.size == 148 <= POOL
    before = made.replica.digest()
    start = {name: t.clone() for name, t in made.replica.live.items()}
    measured = made.do()
    assert made.replica.digest() == before, "a walk leaves no trace"
    made.replica.set(np.rint(-measured.values * 2.0**32).astype(np.int64))
    basis = made.replica.pool.basis
    assert basis is not None
    for name, drift in plain_walk(config, basis).items():
        moved = made.replica.live[name] - start[name]
        assert torch.allclose(moved, drift, rtol=0, atol=1e-5 * float(drift.abs().max()))
        assert float(drift.abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["coordinate", "dct"])
def test_beyond_k_the_decoded_walk_points_the_same_way(kind: str) -> None:
    """Cosine at least .9·√(K/(K+q)); buckets are shared evenly, so that it is near √(K/q)."""
    size, cosines = 64, []
    for seed in range(20):
        config = config_of(kind, pool=size)
        identity = Identity(bytes([seed]) * 32, b"\2" * 32, MANIFEST)
        module = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8))
        replica = SubspaceReplica.of(module, MANIFEST, pool_of(config, identity, 0))
        q = Layout(MANIFEST).size
        drift = torch.from_numpy(np.random.default_rng(seed).normal(size=q)).float()
        replica.set(np.rint(replica.scalars_of(drift) / size * 2.0**32).astype(np.int64))
        decoded = replica.coordinates()
        cosines.append(float(torch.nn.functional.cosine_similarity(drift, decoded, dim=0)))
    assert np.mean(cosines) >= np.sqrt(size / (size + q))
    assert np.mean(cosines) == pytest.approx(np.sqrt(size / q), rel=0.05)


def test_svd_steps_are_galores() -> None:
    """One refresh and then steps in its span: as pytorch_optimizer's GaLore with an exact basis."""
    galore = pytest.importorskip("pytorch_optimizer").GaLore
    gradient = torch.from_numpy(np.random.default_rng(1).normal(size=(12, 7))).float()
    live = torch.zeros(12, 7)
    part = Svd(live.clone(), TensorSpec("w", (12, 7), "float32", 0, 4), gradient)
    theirs = nn.Parameter(live.clone())
    options = {"rank": 4, "update_proj_gap": 10**6, "scale": 1.0, "projection_type": "std"}
    optimizer = galore([{"params": [theirs], **options}], lr=0.01)
    theirs.grad = gradient.clone()
    optimizer.step()
    ours = part.lifted(part.gather(gradient))
    assert torch.linalg.matrix_rank(theirs.detach(), rtol=1e-4) == 4
    span = torch.linalg.svd(gradient, full_matrices=False)[2][:4]
    inside = theirs.detach() @ span.T @ span
    assert torch.allclose(inside, theirs.detach(), atol=1e-6), "theirs stays in that span"
    assert float((ours @ span.T @ span - ours).norm() / ours.norm()) < 0.2, "ours in its 4 bits"


def test_svd_steps_report_their_way_in_full_space() -> None:
    config = config_of("svd", pool=4096, steps=4)
    made = Made(config)
    before = made.replica.digest()
    walked = made.do()
    assert made.replica.digest() == before
    assert walked.values.shape == (4096,)
    made.replica.set(np.rint(-walked.values * 2.0**32).astype(np.int64))
    start = Made(config)
    drop = float((start.loss(range(40)) - made.loss(range(40))).detach())
    assert drop > 0.01, "the decoded way goes down"


def test_a_walk_that_fails_leaves_no_trace() -> None:
    made = Made(config_of("coordinate", learning_rate=1e30))
    before = made.replica.digest()
    with pytest.raises(NonFiniteLoss):
        made.do()
    assert made.replica.digest() == before


# ------------------------------------------------------------- votes


@pytest.mark.parametrize("kind", ["coordinate", "dct"])
def test_a_vote_is_for_the_columns_with_most_gradient(kind: str) -> None:
    made = Made(config_of(kind))
    chosen = vote(made.replica, made.loss, made.batch, [1, 3], kind)
    assert set(chosen) == {1, 3}
    energies = {1: torch.zeros(12), 3: torch.zeros(8)}
    again = Made(config_of(kind))
    for _ in range(4):
        for parameter in again.module.parameters():
            parameter.grad = None
            parameter.requires_grad_(True)
        with again.replica.gradients_to(lambda name, g: add(energies, kind, name, g)):
            again.loss(again.batch()).backward()  # type: ignore[no-untyped-call]
    for tid, values in energies.items():
        best = torch.argsort(values, descending=True)[:RANK].sort().values
        assert chosen[tid].tolist() == best.tolist()


def add(energies: dict[int, torch.Tensor], kind: str, name: str, gradient: torch.Tensor) -> None:
    """Energies by their definition: of columns where there are no more of them than rows."""
    tid = {"0.weight": 1, "1.weight": 3}.get(name)
    if tid is None:
        return
    wide = gradient if tid == 1 else gradient.T
    if kind == "dct":
        n = wide.shape[1]
        i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        rows = torch.cos(torch.pi * i * (2 * j + 1) / (2 * n))
        rows[0] *= 0.5**0.5
        wide = wide @ rows.T
    energies[tid] += wide.square().sum(dim=0)


def test_most_votes_win_and_ties_go_to_lower_columns() -> None:
    votes = [{1: np.array(v)} for v in ([0, 4, 9], [4, 9, 11], [2, 4, 5])]
    assert elections.most_votes(MANIFEST, votes)[1].tolist() == [0, 4, 9]


@pytest.mark.parametrize(
    ("gaps", "why"),
    [
        ([0, 4], "rank"),
        ([0, 4, 0], "ascending"),
        ([0, 4, 8], "ascending"),
        ([2**31, 1, 1], "rank"),
    ],
)
def test_columns_that_are_none_are_refused(gaps: list[int], why: str) -> None:
    with pytest.raises(LedgerError, match=why):
        elections.read(MANIFEST, [pb.Columns(tensor=1, gaps=gaps)], [1])


@pytest.mark.parametrize("tensors", [[], [1, 1], [0], [1, 3]])
def test_columns_of_other_tensors_are_refused(tensors: list[int]) -> None:
    messages = [pb.Columns(tensor=tid, gaps=[0, 1, 1]) for tid in tensors]
    with pytest.raises(LedgerError, match="due"):
        elections.read(MANIFEST, messages, [1])


def test_columns_survive_their_messages() -> None:
    columns = {1: np.array([0, 7, 11]), 3: np.array([2, 3, 4])}
    again = elections.read(MANIFEST, elections.pack(columns), [1, 3])
    assert {tid: c.tolist() for tid, c in again.items()} == {1: [0, 7, 11], 3: [2, 3, 4]}


def test_lazy_elections_ask_less_and_less_often() -> None:
    """Columns that stay the same: five elections, then every second period, and so on."""
    config = tiny.config(
        "backprop",
        run={"rounds": 40},
        directions={"rotate_every": 1},
        subspace={"kind": "coordinate", "rank": RANK, "selection": "voted", "lazy": True},
    )
    state, asked = Elections(), []
    for committed in range(39):
        due = state.due(config, MANIFEST, committed)
        asked.append(bool(due))
        same = {tid: np.arange(RANK) for tid in due}
        state = state.after(config, MANIFEST, committed, pb.Commit(basis=elections.pack(same)))
    assert asked[:7] == [True] * 6 + [False]
    assert 10 < sum(asked) < 20
    assert len(state.bases) == 39, "every period has a basis"
    arrays = state.to_arrays()
    again = Elections.from_arrays(config, MANIFEST, arrays)
    assert [b.indices[3].tolist() for b in again.bases] == [list(range(RANK))] * 39
