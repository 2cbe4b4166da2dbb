"""Weights made as each layer runs: the same bits as a copy's, and the same gradients."""

import copy
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lorand.directions import Family, Pool
from lorand.errors import LedgerError, ModelError
from lorand.kernels import Place
from lorand.kernels.reference import ReferenceBackend
from lorand.layers import Absent
from lorand.layerwise import LayerwiseReplica
from lorand.manifest import Manifest, TensorSpec
from lorand.replica import CopyReplica, Replica

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE: Final = 64
IDS: Final = torch.tensor([[5, 9, 2, 7, 7, 1], [3, 8, 2, 0, 0, 0]])
MASK: Final = (IDS != 0).long()


def random_coefficients(seed: int) -> Any:
    return np.random.default_rng(seed).integers(-(2**24), 2**24, SIZE, dtype=np.int64)


def manifest_of(module: nn.Module, trained: Callable[[str], bool] = lambda _: True) -> Manifest:
    specs = [
        TensorSpec(name, tuple(p.shape), str(p.dtype).removeprefix("torch."), len(name) % 3)
        for name, p in module.named_parameters()
        if trained(name)
    ]
    return Manifest(tuple(sorted(specs, key=lambda spec: spec.name)))


class Both:
    """A module on a copy and the same module layer by layer."""

    def __init__(
        self,
        module: nn.Module,
        *,
        trained: Callable[[str], bool] = lambda _: True,
        family: Family = "hadamard",
    ) -> None:
        self.modules = module.eval(), copy.deepcopy(module).eval()
        manifest, pool = manifest_of(module, trained), Pool((1, 2), SIZE, 32, family)
        self.replicas: tuple[Replica, Replica] = (
            CopyReplica.of(self.modules[0], manifest, pool),
            LayerwiseReplica(self.modules[1], manifest, pool),
        )
        for part in self.modules:
            part.requires_grad_(False)

    def set(self, seed: int) -> None:
        for replica in self.replicas:
            replica.set(random_coefficients(seed))

    @torch.no_grad()
    def answers(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [run(module, *inputs) for module in self.modules]

    def gradients(self, *inputs: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        result = []
        for module, replica in zip(self.modules, self.replicas, strict=True):
            found: dict[str, torch.Tensor] = {}

            def take(name: str, gradient: torch.Tensor, found: Any = found) -> None:
                found[name] = found[name] + gradient if name in found else gradient

            replica.on_gradient(take)
            run(module, *inputs).float().square().sum().backward()  # type: ignore[no-untyped-call]
            assert all(p.grad is None for p in module.parameters())
            result.append(found)
        return result

    def check_gradients(self, *inputs: torch.Tensor) -> None:
        ours, theirs = self.gradients(*inputs)
        assert ours.keys() == theirs.keys()
        for name, expected in ours.items():
            assert float((theirs[name] - expected).norm()) <= 1e-5 * float(expected.norm()), name


def run(module: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    output = module(ids) if mask is None else module(ids, attention_mask=mask)
    return torch.as_tensor(getattr(output, "logits", output))


def transformer(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A random classifier of two layers, the length of a sentence wide."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "num_labels": 2,
        "use_cache": False,
    }
    if kind == "GPT2":
        sizes |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
        sizes |= {"bos_token_id": 1, "eos_token_id": 1}
    if kind == "Llama":
        sizes |= {"num_key_value_heads": 1}
    if kind == "T5":
        sizes |= {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        sizes |= {"decoder_start_token_id": 0, "eos_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**(sizes | changes))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        module: nn.Module = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    return module.to(dtype)


# ------------------------------------------------------------- the same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Bert", "GPT2"])
def test_losses_and_digests_are_those_of_a_copy(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit, at w(A) and at a perturbation, in every dtype."""
    both = Both(transformer(kind, dtype))
    both.set(1)
    outer, inner = both.replicas
    assert outer.digest() == inner.digest()
    settled = both.answers(IDS, MASK)
    assert torch.equal(*settled)
    with outer.perturbed(7, 2**27), inner.perturbed(7, 2**27):
        assert outer.digest() == inner.digest()
        moved = both.answers(IDS, MASK)
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], settled[0])
    assert torch.equal(*both.answers(IDS, MASK))


@pytest.mark.parametrize("family", ["hadamard", "independent"])
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_whatever_happened_before(family: Family, data: st.DataObject) -> None:
    """Adopting, measuring, failing, reading: afterwards copy and layers agree on every bit."""
    both = Both(
        nn.Sequential(nn.Embedding(10, 6), nn.ModuleList([nn.Linear(6, 6)])[0]), family=family
    )
    for _ in range(data.draw(st.integers(1, 5))):
        action = data.draw(st.sampled_from(["set", "measure", "fail", "read"]))
        number = data.draw(st.integers(0, SIZE - 1))
        if action == "set":
            both.set(number)
        for module, replica in zip(both.modules, both.replicas, strict=True):
            if action == "measure":
                with replica.perturbed(number, 12345), torch.no_grad():
                    module(IDS)
            elif action == "fail":
                with pytest.raises(LedgerError), replica.perturbed(number, 2**62):
                    raise AssertionError
            elif action == "read":
                next(iter(replica.weights()))
    assert both.replicas[0].digest() == both.replicas[1].digest()
    assert torch.equal(*both.answers(IDS))


@pytest.mark.parametrize("trained", ["all", "last block", "head"])
def test_frozen_parameters_stay_where_they_are(trained: str) -> None:
    rules: dict[str, Callable[[str], bool]] = {
        "all": lambda name: True,
        "last block": lambda name: "layer.1." in name,
        "head": lambda name: "classifier" in name,
    }
    both = Both(transformer("Bert"), trained=rules[trained])
    both.set(2)
    kept = {name for name, p in both.modules[1].named_parameters() if not isinstance(p, Absent)}
    assert kept == {n for n, _ in both.modules[0].named_parameters() if not rules[trained](n)}
    assert torch.equal(*both.answers(IDS, MASK))
    both.check_gradients(IDS, MASK)


def test_tied_weights_have_one_name_and_are_made_in_both_places() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(12, 8)
            self.blocks = nn.ModuleList([nn.Linear(8, 8)])
            self.head = nn.Linear(8, 12, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.head(self.blocks[0](self.table(ids)).tanh()))

    both = Both(Tied())
    assert [s.name for s in both.replicas[1].manifest.tensors] == [
        "blocks.0.bias",
        "blocks.0.weight",
        "table.weight",
    ]
    both.set(3)
    assert torch.equal(*both.answers(IDS))
    both.check_gradients(IDS)


def test_a_layer_that_returns_its_weights() -> None:
    """Position tables often are: the next layer's weights must not be written over them."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.arange(60.0).reshape(10, 6))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return x, {"positions": self.table[: x.shape[1]]}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = Positions()
            self.words = nn.Embedding(10, 6)
            self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            ids, others = self.positions(ids)
            x = self.words(ids)
            for block in self.blocks:
                x = block(x)
            return torch.as_tensor(x * others["positions"])

    both = Both(Model())
    both.set(4)
    assert torch.equal(*both.answers(IDS))
    both.check_gradients(IDS)


def test_fast_paths_inside_a_block_find_their_weights() -> None:
    """nn.TransformerEncoderLayer reads its children's parameters without calling them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.encoder(self.words(ids)))

    both = Both(Model())
    both.set(5)
    assert torch.equal(*both.answers(IDS))
    both.check_gradients(IDS)


# ------------------------------------------------------------- what is refused


class Leaky(nn.Module):
    """Uses the weight of a block outside of it, as DeBERTa its table of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.blocks[0](x) @ self.blocks[0].weight)


@pytest.mark.parametrize("grad", [False, True])
def test_a_weight_used_outside_of_its_layer(grad: bool) -> None:
    both = Both(Leaky())
    both.replicas[1].on_gradient(lambda *_: None)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(ModelError, match=r"uses 'blocks\.0\.weight' outside .* `--weights copy`"),
    ):
        both.modules[1](torch.ones(2, 6))
    both.replicas[1].digest()  # it can still be read


def test_a_recurrent_layer_is_refused() -> None:
    """It keeps a list of its own of the parameters, where base weights would go on living."""
    with pytest.raises(ModelError, match="recurrent"):
        Both(nn.LSTM(3, 4))


def test_the_parameters_themselves_hold_nothing_any_more() -> None:
    """Whoever kept a reference gets an error from torch, not base weights."""
    module = nn.Linear(4, 4)
    before = module.weight
    LayerwiseReplica(module, manifest_of(module), Pool((1, 2), SIZE, 32))
    assert before.numel() == 0
    assert isinstance(module.weight, Absent)


def test_a_model_that_does_not_fit_is_refused() -> None:
    module = nn.Linear(4, 4)
    manifest = Manifest((TensorSpec("weight", (4, 5), "float32"),))
    with pytest.raises(ModelError, match=r"\(4, 4\) in this model"):
        LayerwiseReplica(module, manifest, Pool((1, 2), SIZE, 32))


def test_a_backward_pass_over_a_cache_of_keys_is_refused() -> None:
    """Running a layer twice would append to it twice."""
    both = Both(transformer("GPT2", use_cache=True))
    both.replicas[1].on_gradient(lambda *_: None)
    with pytest.raises(ModelError, match="set use_cache to false"):
        run(both.modules[1], IDS, MASK)


def test_an_error_inside_a_layer_leaves_the_replica_as_it_was() -> None:
    both = Both(transformer("Bert"))
    both.set(6)
    with pytest.raises(IndexError), torch.no_grad():
        run(both.modules[1], IDS + 100, MASK)
    assert torch.equal(*both.answers(IDS, MASK))
    assert both.replicas[0].digest() == both.replicas[1].digest()
    assert all(isinstance(p, Absent) for p in both.modules[1].parameters())


# ------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "GPT2", "Llama", "T5", "Albert"])
def test_gradients_are_those_of_a_copy(kind: str) -> None:
    both = Both(transformer(kind))
    both.set(7)
    ids = IDS if kind != "T5" else torch.where(IDS == 1, 6, IDS).index_fill(1, torch.tensor([2]), 1)
    assert torch.equal(*both.answers(ids, MASK))
    both.check_gradients(ids, MASK)
    both.check_gradients(ids, MASK)


def test_gradients_pass_through_frozen_blocks() -> None:
    both = Both(transformer("Bert"), trained=lambda name: "layer.0." in name)
    both.set(8)
    both.check_gradients(IDS, MASK)


def test_gradients_under_autocast_are_computed_in_the_precision_of_the_pass() -> None:
    """Backward runs outside of the caller's autocast; layers are run again inside of it."""
    both = Both(transformer("Bert"))
    both.set(9)
    results = []
    for module, replica in zip(both.modules, both.replicas, strict=True):
        found: dict[str, torch.Tensor] = {}
        replica.on_gradient(found.__setitem__)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = run(module, IDS, MASK)
        logits.float().square().sum().backward()  # type: ignore[no-untyped-call]
        results.append((logits, found))
    (expected, ours), (given_, theirs) = results
    assert torch.equal(expected, given_)
    for name, gradient in ours.items():
        assert float((theirs[name] - gradient).norm()) <= 0.01 * float(gradient.norm()), name


def test_no_gradient_outlives_its_projection() -> None:
    """When one is handed over, none of those before it is there any more."""
    import weakref

    both = Both(transformer("Bert"))
    alive: list[Any] = []
    most = 0

    def take(_: str, gradient: torch.Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(gradient))
        most = max(most, sum(ref() is not None for ref in alive))

    both.replicas[1].on_gradient(take)
    run(both.modules[1], IDS, MASK).sum().backward()  # type: ignore[no-untyped-call]
    assert len(alive) > 10
    assert most == 1


# ------------------------------------------------------------- memory


class Largest(ReferenceBackend):
    """Notes how many bytes of weights exist at a time."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.memory: set[int] = set()

    def materialise_all(self, places: Any, tables: Any, *, key: Any) -> None:
        self.calls.append(sum(place.out.nbytes for place in places))
        self.memory |= {place.out.untyped_storage().data_ptr() for place in places}
        assert all(isinstance(place, Place) for place in places)
        super().materialise_all(places, tables, key=key)


def test_weights_are_made_layer_by_layer_in_the_same_memory() -> None:
    module = nn.Sequential(*nn.ModuleList(nn.Linear(32, 32) for _ in range(4)))
    backend = Largest()
    replica = LayerwiseReplica(module, manifest_of(module), Pool((1, 2), SIZE, 32), backend)
    with torch.no_grad():
        module(torch.ones(1, 32))
    assert backend.calls == [(32 * 32 + 32) * 4] * 4, "each layer once, all its tensors in a walk"
    assert len(backend.memory) == 1
    replica.settle()
    assert len(backend.calls) == 4
    list(replica.weights())
    assert len(backend.memory) == 1


def test_the_base_is_not_copied(tmp_path: Any) -> None:
    """It may be a file mapped into memory: its bytes are read in place and never written."""
    path = tmp_path / "weights"
    path.write_bytes(np.arange(1024, dtype=np.float32).tobytes())
    content = path.read_bytes()
    module = nn.Linear(32, 32, bias=False)
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=4096)
    module.weight.data = torch.empty(0).set_(storage).reshape(32, 32)  # type: ignore[arg-type]
    bases: list[int] = []

    class Watching(ReferenceBackend):
        def materialise_all(self, places: Any, tables: Any, *, key: Any) -> None:
            bases.extend(place.base.data_ptr() for place in places)
            super().materialise_all(places, tables, key=key)

    replica = LayerwiseReplica(module, manifest_of(module), Pool((1, 2), SIZE, 32), Watching())
    replica.set(random_coefficients(1))
    with torch.no_grad():
        module(torch.ones(32))
    assert bases == [storage.data_ptr()]
    assert path.read_bytes() == content
