"""The manifest and run.lock: what every replica of a run must share (DESIGN §2 step 1, §3)."""

import hashlib
import json
from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorand.errors import ConfigError, ModelError
from lorand.manifest import (
    MAX_TENSORS,
    Identity,
    Manifest,
    TensorSpec,
    run_digest,
    select_trainable,
)

WEIGHT: Final = TensorSpec("a.weight", (2, 3), "float32")
BIAS: Final = TensorSpec("b", (), "bfloat16", 4)
MANIFEST: Final = Manifest((WEIGHT, BIAS))
IDENTITY: Final = Identity(b"\1" * 32, b"\2" * 32, MANIFEST)


# ------------------------------------------------------------- the digest


def test_the_digest_is_pinned() -> None:
    """A change here changes the pool, and with it the directions, of every existing run."""
    assert MANIFEST.to_json() == '[["a.weight",[2,3],"float32",0],["b",[],"bfloat16",4]]'
    assert MANIFEST.digest() == hashlib.sha256(MANIFEST.to_json().encode()).digest()
    assert MANIFEST.digest().hex() == (
        "8712a395561e01f1df05fdbe8e1ff0f215a572eebc2c65fde6a5c3c779609a1d"
    )


@pytest.mark.parametrize(
    "changed",
    [
        (replace(WEIGHT, name="a.weights"), BIAS),
        (replace(WEIGHT, shape=(3, 2)), BIAS),
        (replace(WEIGHT, shape=(6,)), BIAS),
        (replace(WEIGHT, dtype="float16"), BIAS),
        (replace(WEIGHT, scale_exponent=-1), BIAS),
        (WEIGHT,),
    ],
    ids=["name", "shape", "rank", "dtype", "scale", "fewer"],
)
def test_any_change_changes_the_digest(changed: tuple[TensorSpec, ...]) -> None:
    """DESIGN §2 step 10: direction scales are part of the run's digest."""
    assert Manifest(changed).digest() != MANIFEST.digest()


SPECS: Final = st.builds(
    TensorSpec,
    name=st.text(min_size=1, max_size=8),
    shape=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    scale_exponent=st.integers(-10, 10),
)


@settings(deadline=None)
@given(st.lists(SPECS, min_size=1, max_size=6, unique_by=lambda spec: spec.name))
def test_json_round_trip(specs: list[TensorSpec]) -> None:
    manifest = Manifest(tuple(sorted(specs, key=lambda spec: spec.name)))
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.digest() == manifest.digest()


def test_num_weights() -> None:
    """A scalar tensor has one weight, an empty one none."""
    assert [spec.size for spec in (WEIGHT, BIAS, replace(BIAS, shape=(4, 0)))] == [6, 1, 0]
    assert MANIFEST.num_weights == 7


@pytest.mark.parametrize("order", [(BIAS, WEIGHT), (WEIGHT, WEIGHT)], ids=["unsorted", "twice"])
def test_a_manifest_is_sorted_and_lists_each_tensor_once(order: tuple[TensorSpec, ...]) -> None:
    """DESIGN §2 step 1: a tensor's place is its number, the same everywhere."""
    with pytest.raises(ModelError, match="once, sorted by name"):
        Manifest(order)


def test_a_manifest_has_at_least_one_tensor_and_a_limit() -> None:
    """Invariant 5: every list has a limit."""
    with pytest.raises(ModelError, match=f"1 to {MAX_TENSORS} tensors, not 0"):
        Manifest(())
    many = tuple(TensorSpec(f"{i:06}", (1,), "float32") for i in range(MAX_TENSORS + 1))
    with pytest.raises(ModelError, match=f"not {MAX_TENSORS + 1}"):
        Manifest(many)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "7", "{}", "[]", "[[]]", "[7]", '[["a",[1],"float32"]]',
     '[["a",1,"float32",0]]', '[["a",["x"],"float32",0]]', '[["a",[1],"float32",null]]'],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(ModelError):
        Manifest.from_json(text)


# ------------------------------------------------------------- the run's digest


def test_the_run_digest_is_pinned_and_covers_everything() -> None:
    """Config, base model, tokenizer and trainable set name the run; each alone renames it."""
    config = b"\3" * 32
    assert run_digest(config, IDENTITY).hex() == (
        "223df781c549044de59ad9a91ca33ed620cc69e061896326b20fd0687a50dd84"
    )
    others = [
        run_digest(b"\4" * 32, IDENTITY),
        run_digest(config, replace(IDENTITY, base_digest=b"\2" * 32)),
        run_digest(config, replace(IDENTITY, tokenizer_digest=b"\1" * 32)),
        run_digest(config, replace(IDENTITY, manifest=Manifest((WEIGHT,)))),
    ]
    assert len({run_digest(config, IDENTITY), *others}) == 5


# ------------------------------------------------------------- run.lock


def damaged(**changes: Any) -> str:
    lock = json.loads(IDENTITY.to_lock())
    lock.update(changes)
    return json.dumps(lock)


def test_lock_round_trip() -> None:
    assert Identity.from_lock(IDENTITY.to_lock()) == IDENTITY
    assert Identity.from_lock(json.dumps(json.loads(IDENTITY.to_lock()), indent=4)) == IDENTITY


LOCK: Final = IDENTITY.to_lock()


@pytest.mark.parametrize(
    "text",
    [
        "",
        LOCK[:-20],
        "[]",
        "null",
        "{}",
        LOCK.replace('"base_digest"', '"bass_digest"'),
        damaged(format="lorand/run.lock/v0"),
        damaged(format=None),
        damaged(base_digest="01" * 31),
        damaged(base_digest="zz" * 32),
        damaged(base_digest=7),
        damaged(tokenizer_digest=""),
        damaged(manifest_digest="00" * 32),
        damaged(manifest=[["a.weight", [2, 3], "float32", 1], ["b", [], "bfloat16", 4]]),
        damaged(manifest=[["b", [], "bfloat16", 4], ["a.weight", [2, 3], "float32", 0]]),
        damaged(manifest=[]),
        damaged(manifest={}),
        damaged(manifest=None),
        damaged(manifest=[["a.weight", [2, 3]]]),
    ],
)
def test_a_damaged_lock_is_refused_with_the_way_out(text: str) -> None:
    """A lock edited by hand would otherwise be another run under the same name."""
    with pytest.raises(ConfigError, match=r"run\.lock.*; write it again with `lr-worker prepare"):
        Identity.from_lock(text)


# ------------------------------------------------------------- which tensors are trained


def layers(prefix: str, count: int, inside: list[str]) -> list[str]:
    return [f"{prefix}.{layer}.{name}" for layer in range(count) for name in inside]


BERT: Final = [
    "bert.embeddings.word_embeddings.weight",
    "bert.embeddings.LayerNorm.weight",
    *layers(
        "bert.encoder.layer",
        12,
        ["attention.self.query.weight", "attention.output.LayerNorm.weight", "output.dense.bias"],
    ),
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
    "classifier.weight",
    "classifier.bias",
]
GPT: Final = [
    "transformer.wte.weight",
    "transformer.wpe.weight",
    *layers("transformer.h", 12, ["ln_1.weight", "attn.c_attn.weight", "mlp.c_proj.bias"]),
    "transformer.ln_f.weight",
    "transformer.ln_f.bias",
    "score.weight",
]
LLAMA: Final = [
    "model.embed_tokens.weight",
    *layers("model.layers", 32, ["self_attn.q_proj.weight", "mlp.down_proj.weight"]),
    "model.norm.weight",
    "score.weight",
]
BARE: Final = ["embed.weight", *layers("layers", 3, ["w"]), "head.weight"]
TWO_STACKS: Final = [
    *layers("adapter.blocks", 2, ["w"]),
    *layers("model.layers", 11, ["w"]),
    "head.weight",
]


@pytest.mark.parametrize(
    ("names", "rule", "expected"),
    [
        (BERT, "last:1", layers("bert.encoder.layer", 12, ["attention.self.query.weight",
         "attention.output.LayerNorm.weight", "output.dense.bias"])[-3:] + BERT[-4:]),
        (BERT, "last:12", BERT[2:]),
        (GPT, "last:2", GPT[2 + 3 * 10 :]),
        (LLAMA, "last:3", LLAMA[1 + 2 * 29 :]),
        (BARE, "last:2", ["layers.1.w", "layers.2.w", "head.weight"]),
        (TWO_STACKS, "last:1", ["model.layers.10.w", "head.weight"]),
        (["h.0.w", "between.w", "h.1.w", "after.w"], "last:1", ["h.1.w", "after.w"]),
        (BERT, "name:classifier", ["classifier.weight", "classifier.bias"]),
        (BERT, r"name:\.layer\.(10|11)\..*query",
         [f"bert.encoder.layer.{n}.attention.self.query.weight" for n in (10, 11)]),
        (GPT, "name:ln_f|score", GPT[-3:]),
        (LLAMA, "name:^model.norm", ["model.norm.weight"]),
    ],
    ids=["bert 1", "bert all layers", "gpt 2", "llama 3", "bare", "deepest stack", "between",
         "bert head", "bert regex", "gpt either", "llama anchored"],
)  # fmt: skip
def test_trainable_rules(names: list[str], rule: str, expected: list[str]) -> None:
    """The last N layers by number (10 after 9), and all that is registered after the stack."""
    assert select_trainable(names, rule) == expected


@pytest.mark.parametrize("names", [BERT, GPT, LLAMA], ids=["bert", "gpt", "llama"])
def test_all_keeps_everything_in_the_models_order(names: list[str]) -> None:
    assert select_trainable(names, "all") == names
    assert select_trainable(names, "name:") == names


@pytest.mark.parametrize(
    "rule",
    ["", "al", "all:", "last", "last:", "last:0", "last:-1", "last:two", "last:²", "first:2"],
)
def test_rules_that_are_none(rule: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.trainable.*use 'all', 'last:N' or 'name:REGEX'"):
        select_trainable(BERT, rule)


def test_a_rule_that_is_no_regular_expression() -> None:
    with pytest.raises(ConfigError, match=r"model\.trainable.*not a regular expression"):
        select_trainable(BERT, "name:(")


@pytest.mark.parametrize(
    ("names", "rule", "message"),
    [
        (BERT, "name:lm_head", r"matches no parameter.*bert\.embeddings.*classifier\.bias"),
        (BERT, "last:13", "the model has 12 layers"),
        (["weight", "bias"], "last:1", "numbered layers"),
    ],
    ids=["nothing matches", "too many layers", "no layers"],
)
def test_rules_that_do_not_fit_the_model(names: list[str], rule: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        select_trainable(names, rule)
