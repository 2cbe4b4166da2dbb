"""Ranks of subspaces: fixed, or from singular values and then from the run."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from lorand.config import RunConfig
from lorand.errors import ConfigError, ModelError
from lorand.manifest import Identity, Manifest, TensorSpec
from lorand.sections import SubspaceSection
from lorand_worker import data, model, preparing
from lorand_worker.bench import Base, load_base
from lorand_worker.model import LoadedModel
from lorand_worker.ranks import low_rank, ranks, shifts

pytestmark = pytest.mark.usefixtures("one_thread")
NONE: frozenset[str] = frozenset()


def section_of(**settings: Any) -> SubspaceSection:
    return SubspaceSection(**{"kind": "coordinate", "rank": 4, **settings})


def config_of(**settings: Any) -> RunConfig:
    return tiny.config("spsa", subspace={"kind": "coordinate", "rank": 8, **settings})


def with_spectrum(values: torch.Tensor, width: int, seed: int = 0) -> torch.Tensor:
    """A matrix, shape (len(values), width), with these singular values."""
    source = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=source))
    right, _ = torch.linalg.qr(torch.randn(width, len(values), generator=source))
    return torch.as_tensor(left * values @ right.T)


TENSORS: Mapping[str, torch.Tensor] = {
    "layer.query.weight": with_spectrum(0.5 ** torch.arange(16.0), 20, 1),
    "layer.query.bias": torch.zeros(16),
    "layer.key.weight": with_spectrum(torch.linspace(2, 1, 12), 12, 2),
    "layer.types.weight": torch.ones(2, 12),
    "head.weight": torch.zeros(5, 16),
}


# ------------------------------------------------------------- fixed


def test_every_large_matrix_but_a_new_heads() -> None:
    found = ranks(section_of(), TENSORS, frozenset({"head.weight"}))
    expected = {"layer.query.weight": 4, "layer.key.weight": 4}
    assert found == dict.fromkeys(TENSORS, 0) | expected
    assert list(found) == list(TENSORS)
    assert ranks(section_of(), TENSORS, NONE)["head.weight"] == 4
    assert ranks(section_of(rank=11), TENSORS, NONE)["layer.key.weight"] == 11
    assert ranks(section_of(rank=12), TENSORS, NONE)["layer.key.weight"] == 0, "not below 12"


def test_targets_select_matrices() -> None:
    found = ranks(section_of(targets=r"query\.weight$"), TENSORS, NONE)
    assert found == dict.fromkeys(TENSORS, 0) | {"layer.query.weight": 4}
    head = ranks(section_of(targets="head"), TENSORS, frozenset({"head.weight"}))
    assert head == dict.fromkeys(TENSORS, 0) | {"head.weight": 4}, "asked for by name"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"targets": "value"}, "'value' matches no trainable tensor; there are, for example, lay"),
        ({"targets": "query"}, r"matches 'layer.query.bias' of shape \(16,\), which is no matrix"),
        ({"targets": "types"}, r"\(2, 12\), which has no subspace of rank 4: .* below 2, or match"),
        ({"rank": 16}, r"both sides above subspace\.rank = 16: lower it, .* model\.trainable"),
    ],
)
@pytest.mark.parametrize("rule", ["fixed", "welore"])
def test_tensors_without_such_a_subspace(
    settings: dict[str, Any], sentence: str, rule: str
) -> None:
    with pytest.raises(ModelError, match=sentence):
        ranks(section_of(**settings, rank_rule=rule), TENSORS, NONE)


@pytest.mark.parametrize("kind", ["full", "svd"])
@pytest.mark.parametrize("rule", ["fixed", "welore"])
def test_other_kinds_have_no_ranks(tiny_model: Path, kind: str, rule: str) -> None:
    """Not even where the section says more, and digests stay what they were."""
    section = section_of(kind=kind, rank_rule=rule, targets="nothing", scale=4.0)
    found = ranks(section, TENSORS, NONE)
    assert found == dict.fromkeys(TENSORS, 0)
    assert set(shifts(section, found).values()) == {0}
    loaded = model.load(config_of().model, 2, tiny_model)
    plain = model.identity(loaded, tiny.config("spsa"))
    local = {"steps": 1, "space": "weights"}
    run = tiny.config("backprop", subspace=section.model_dump(), local=local)
    assert model.identity(loaded, run) == plain
    assert all(len(row) == 4 for row in json.loads(plain.manifest.to_json()))


# ------------------------------------------------------------- WeLore


def test_one_threshold_for_all_matrices() -> None:
    """σ' of `steep` is about 1, 1/2, 1/4 …; of `even` 1, 6/7 …; of `lower` 1 and then little."""
    matrices = {
        "steep": with_spectrum(0.5 ** torch.arange(8.0), 30, 3),
        "even": 100 * with_spectrum(torch.linspace(8, 1, 8), 8, 4),
        "lower": with_spectrum(torch.tensor([1.0] + [0.01] * 8 + [0.0]), 11, 5),
    }
    # The 12 largest of σ': 1 1 1 .857 .714 .571 .496 .429 .286 .244 .143 .118
    assert low_rank(matrices, 4) == {"steep": 4, "lower": 1}
    # The 6 largest
    assert low_rank(matrices, 2) == {"steep": 1, "even": 4, "lower": 1}
    assert low_rank({"even": matrices["even"]}, 4) == {"even": 4}, "4 of 8: .5 is above .4999"
    with pytest.raises(ModelError, match=r"no matrix is of low rank at subspace\.rank = 5 .*fixed"):
        low_rank({"even": matrices["even"]}, 5)


def test_the_average_is_what_was_asked_for() -> None:
    source = torch.Generator().manual_seed(1)
    matrices = {
        str(i): with_spectrum(torch.rand(32, generator=source) ** (i + 1), 40, i) for i in range(6)
    }
    for average in (1, 3, 7):
        found = low_rank(matrices, average)
        assert len(found) == 6, "all of low rank"
        assert sum(found.values()) == 6 * average


def test_what_is_not_of_low_rank_is_frozen() -> None:
    """Small tensors, a new head and what targets leave out are trained as they are."""
    section = section_of(rank_rule="welore", rank=6)
    found = ranks(section, TENSORS, frozenset({"head.weight"}))
    others = {"layer.query.bias": 0, "layer.types.weight": 0, "head.weight": 0}
    assert found == {"layer.query.weight": 3} | others
    chosen = section.model_copy(update={"targets": r"query\.weight", "rank": 3})
    found = ranks(chosen, TENSORS, NONE)
    assert found == dict.fromkeys(TENSORS, 0) | {"layer.query.weight": 3}


def test_matrices_of_no_spectrum() -> None:
    section = section_of(rank_rule="welore")
    for value in (0.0, float("nan")):
        with pytest.raises(ModelError, match=r"'zero' is zero or not finite.*leave it out"):
            ranks(section, {"zero": torch.full((9, 9), value), **TENSORS}, NONE)
    even = {"even": torch.eye(9), "steep": TENSORS["layer.query.weight"]}
    assert low_rank(even, 5) == {"steep": 1}, "all alike: none can go"


def test_bfloat16() -> None:
    matrix = TENSORS["layer.query.weight"]
    assert low_rank({"m": matrix.bfloat16()}, 3) == low_rank({"m": matrix}, 3) == {"m": 3}


def manifest_of(found: Mapping[str, int]) -> Manifest:
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    return Manifest(
        tuple(TensorSpec(name, shapes[name], "float32", 0, found[name]) for name in sorted(found))
    )


def test_nothing_is_measured_anew_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    section = section_of(rank_rule="welore", rank=6)
    new = frozenset({"head.weight"})
    found = ranks(section, TENSORS, new)
    decided = {**found, "layer.query.weight": 5}
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    assert ranks(section, TENSORS, new, manifest_of(decided)) == decided
    fixed = section_of(rank=6)
    assert ranks(fixed, TENSORS, new, manifest_of(decided)) == ranks(fixed, TENSORS, new), (
        "the rule leaves no choice"
    )


@pytest.mark.parametrize(
    "change", [{"layer.query.weight": 9}, {"layer.query.weight": 0}, {"head.weight": 3}]
)
def test_ranks_that_no_rule_would_find(change: dict[str, int]) -> None:
    section = section_of(rank_rule="welore", rank=6)
    new = frozenset({"head.weight"})
    theirs = manifest_of({**ranks(section, TENSORS, new), **change})
    with pytest.raises(ModelError, match=r"at rank \d, which .* not lead to; prepare the run agai"):
        ranks(section, TENSORS, new, theirs)


# ------------------------------------------------------------- runs


@pytest.fixture
def uneven(tiny_model: Path) -> LoadedModel:
    """A model in whose last layer some matrices are of low rank; the others are orthogonal."""
    loaded = model.load(config_of().model, 2, tiny_model)
    for i, (name, tensor) in enumerate(loaded.module.named_parameters()):
        if tensor.dim() == 2 and ".layer.2." in name:
            values = 0.7 ** torch.arange(32.0) if "query" in name else torch.linspace(1.01, 1, 32)
            wide = tensor.shape[0] <= tensor.shape[1]
            matrix = with_spectrum(values, max(tensor.shape), i)
            tensor.data.copy_(matrix if wide else matrix.T)
    return loaded


def specs_of(identity: Identity) -> dict[str, TensorSpec]:
    return {spec.name.split("layer.2.")[-1]: spec for spec in identity.manifest.tensors}


def test_ranks_and_scales_are_in_the_manifest(tiny_model: Path) -> None:
    loaded = model.load(config_of().model, 2, tiny_model)
    config = config_of(scale=8.0, targets=r"(query|key)\.weight$")
    found = specs_of(model.identity(loaded, config))
    plain = specs_of(model.identity(loaded, tiny.config("spsa")))
    assert found.keys() == plain.keys()
    for name, spec in found.items():
        chosen = name.endswith(("query.weight", "key.weight"))
        shift, rank = (3, 8) if chosen else (0, 0)
        exponent = plain[name].scale_exponent + shift
        assert spec == replace(plain[name], rank=rank, scale_exponent=exponent)


@pytest.mark.parametrize("rule", ["head", "size", "calibrated"])
def test_a_run_of_measured_ranks(uneven: LoadedModel, rule: str) -> None:
    """Trained: low-rank matrices, vectors and the head. Joining, all of it is the run's."""
    config = config_of(rank_rule="welore", scale=0.25, rank=20)
    directions = config.directions.model_copy(update={"scale_rule": "head"})
    preparing_config = config.model_copy(update={"directions": directions})
    theirs = model.identity(uneven, preparing_config, prepares=True)
    found = specs_of(theirs)
    matrices = {name: spec for name, spec in found.items() if len(spec.shape) == 2}
    assert matrices.keys() == {"attention.self.query.weight", "head.weight"}
    query = matrices["attention.self.query.weight"]
    assert 0 < query.rank <= 16
    assert query.scale_exponent == -2
    assert (found["head.weight"].rank, found["head.weight"].scale_exponent) == (0, 4)
    assert "output.dense.bias" in found
    directions = config.directions.model_copy(update={"scale_rule": rule})
    config = config.model_copy(update={"directions": directions})
    assert model.identity(uneven, config, theirs) == theirs, "shifted once"
    with pytest.raises(ConfigError, match=r"needs a run\.lock with the ranks .* `lr-worker prepa"):
        model.identity(uneven, config)


class Notes(list[str]):
    """A Reporter that keeps what it is told."""

    def note(self, text: str) -> None:
        self.append(text)

    def progress(self, committed: int, total: int, text: str) -> None: ...


@pytest.mark.parametrize("rule", ["head", "calibrated"])
def test_preparing(
    uneven: LoadedModel, tmp_path: Path, tiny_data: dict[str, Path], rule: str
) -> None:
    folder = tmp_path / "uneven"
    uneven.tokenizer.save_pretrained(folder)
    encoder: Any = uneven.module.encoder
    encoder.save_pretrained(folder)
    settings = tiny.settings(
        "spsa",
        subspace={"kind": "dct", "rank": 20, "rank_rule": "welore", "scale": 2.0},
        directions={"scale_rule": rule},
    )
    config = RunConfig.parse(tiny.to_toml(settings))
    run = tmp_path / "run.toml"
    told = Notes()

    def load(of: RunConfig) -> Base:
        return load_base(of, folder, "cpu", prepares=True)

    source = tiny_data["hotels"] if rule == "calibrated" else None
    preparing.check(run, config, source)
    examples = None if source is None else data.load(source, config.task)
    assert preparing.written(run, config) is None
    identity = preparing.prepare(config, examples, load, told)
    preparing.write(run, identity)
    text = "\n".join(told)
    assert re.search(r"query\.weight: rank \d+ of 32", text)
    assert "attention.self.key.weight: frozen, not of low rank" in text
    assert preparing.written(run, config) == identity
    assert load_base(config, folder, "cpu", theirs=identity).identity == identity
    with pytest.raises(ConfigError, match=r"run\.lock"):
        load_base(config, folder, "cpu")
    plain = tiny.config("spsa")
    assert preparing.written(run, plain) is None, "nothing of it was measured"
    run.with_name("run.lock").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"cannot read .*run\.lock"):
        preparing.written(run, config)
