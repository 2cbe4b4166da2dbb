"""Signed heads: what is signed, and that nothing else passes for it."""

import json
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.signed_histories import BODIES, KEY, OTHER_KEY, RUN, position_of

from lorand import heads, merkle
from lorand.errors import ConfigError, LedgerError
from lorand.heads import Head, KeptHead, Signature

HEAD = position_of(BODIES).history
KEPT = KeptHead(RUN, HEAD, heads.sign(KEY, RUN, HEAD))


def test_a_readers_history_is_that_of_its_entries() -> None:
    tree = merkle.Tree()
    for body in BODIES:
        tree.add(merkle.leaf_hash(body))
    assert Head(len(BODIES), tree.root(), position_of(BODIES).head) == HEAD


def test_what_is_signed() -> None:
    """Bytes are fixed: another release must find the same."""
    expected = b"lorand/head/v1" + RUN + bytes([len(BODIES), *bytes(7)]) + HEAD.root + HEAD.digest
    assert heads.signed_bytes(RUN, HEAD) == expected
    assert len(expected) == 118


@pytest.mark.parametrize(
    ("run", "head"),
    [
        (bytes(32), HEAD),
        (RUN, replace(HEAD, size=HEAD.size + 1)),
        (RUN, replace(HEAD, root=bytes(32))),
        (RUN, replace(HEAD, digest=bytes(32))),
    ],
)
def test_a_signature_is_of_one_history_of_one_run(run: bytes, head: Head) -> None:
    signature = heads.sign(KEY, RUN, HEAD)
    assert signature.is_of(RUN, HEAD)
    assert not signature.is_of(run, head)
    assert not replace(signature, key=OTHER_KEY.public).is_of(RUN, HEAD)


def test_no_key_signs_nothing() -> None:
    assert heads.signer(None, RUN) is None


def test_a_kept_head_is_read_back() -> None:
    assert KeptHead.from_json(KEPT.to_json()) == KEPT


@given(st.data())
def test_a_damaged_head_is_our_error(data: st.DataObject) -> None:
    """Any character changed: it is refused, or says the same (a hexadecimal digit's case)."""
    text = KEPT.to_json()
    place = data.draw(st.integers(0, len(text) - 1))
    changed = text[:place] + data.draw(st.characters()) + text[place + 1 :]
    with suppress(LedgerError):
        assert KeptHead.from_json(changed.encode("utf-8", "surrogatepass")) == KEPT


@pytest.mark.parametrize(
    "change",
    [{"size": 0}, {"size": "9"}, {"size": 1 << 64}, {"run": "00"}, {"key": None}, {"format": "v9"}],
)
def test_a_head_that_cannot_be_is_our_error(change: dict[str, object]) -> None:
    with pytest.raises(LedgerError, match="this is no head of a ledger"):
        KeptHead.from_json(json.dumps(json.loads(KEPT.to_json()) | change))


@pytest.mark.parametrize("text", ["", "zz" * 32, "00" * 31, "00" * 33])
def test_a_key_has_64_digits(text: str) -> None:
    with pytest.raises(ConfigError, match="no key of 64 hexadecimal digits"):
        heads.public_key(text)
    assert heads.public_key(KEY.public.hex()) == KEY.public


def test_signatures_are_values() -> None:
    assert heads.sign(KEY, RUN, HEAD) == Signature(KEY.public, KEPT.signature.value)
