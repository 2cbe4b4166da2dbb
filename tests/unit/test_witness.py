"""A worker that holds its coordinator to what it showed before."""

from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.signed_histories import BODIES, KEY, OTHER_KEY, RUN, answer, forked, position_of

from lorand import heads
from lorand.errors import Behind, HandshakeError, LorandError
from lorand.heads import Head, KeptHead
from lorand.privacy.primitives import IdentityKey
from lorand_worker.feedback import Place
from lorand_worker.witness import Witness

SIZE: Final = len(BODIES)


def witness(folder: Path | None, key: bytes | None = None) -> tuple[Witness, list[str]]:
    told: list[str] = []
    place = None if folder is None else Place(folder, RUN, "worker-1")
    return Witness(RUN, place, key, told.append), told


def show(one: Witness, bodies: list[bytes], size: int = SIZE, key: IdentityKey = KEY) -> None:
    """Have the coordinator of a history show its first entries, as a session asks."""
    one.expect(size, signs=True)
    ours = position_of(bodies[:size]).history
    one.take(ours, answer(bodies, size, one.known_size, key))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, SIZE), min_size=1, max_size=4).map(sorted))
def test_a_history_that_grows_is_believed(sizes: list[int]) -> None:
    one, told = witness(None)
    for size in sizes:
        show(one, BODIES, size)
        assert one.known_size == size
    assert told == [f"the run's ledger is signed by {KEY.public.hex()}: noted"]


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize(
    ("known", "at", "size"), [(3, 1, 3), (3, 2, 9), (4, 3, 4), (8, 0, 9), (7, 6, 8)]
)
def test_a_forked_history_is_refused(
    known: int, at: int, size: int, restarted: bool, tmp_path: Path
) -> None:
    """Also by a worker that was started again: it has the head in a file."""
    one, _ = witness(tmp_path)
    show(one, BODIES, known)
    if restarted:
        one, _ = witness(tmp_path)
    with pytest.raises(HandshakeError, match=rf"begin with the {known} entries .* was forked"):
        show(one, forked(at) if at else [BODIES[0], *forked(1)[1:]], size)
    assert one.known_size == known


def test_a_fork_behind_what_was_seen_is_none_to_this_worker() -> None:
    one, _ = witness(None)
    show(one, BODIES, 5)
    show(one, forked(5))
    assert one.known_size == SIZE


@pytest.mark.parametrize("size", [0, 1, 5])
def test_a_ledger_that_was_rolled_back_is_refused(size: int, tmp_path: Path) -> None:
    one, _ = witness(tmp_path)
    show(one, BODIES, 6)
    again, _ = witness(tmp_path)
    with pytest.raises(Behind, match=f"has {size} entries, and it signed 6 .*rolled back"):
        again.expect(size, signs=True)


def test_another_key_is_refused_until_its_owner_says_so(tmp_path: Path) -> None:
    one, _ = witness(tmp_path)
    show(one, BODIES, 4)
    again, told = witness(tmp_path)
    with pytest.raises(
        HandshakeError, match=f"join with --coordinator-key {OTHER_KEY.public.hex()}"
    ):
        show(again, BODIES, key=OTHER_KEY)
    told_of, _ = witness(tmp_path, OTHER_KEY.public)
    show(told_of, BODIES, key=OTHER_KEY)
    assert told == []
    with pytest.raises(HandshakeError, match="forked"):
        show(witness(tmp_path, KEY.public)[0], forked(2))


def test_a_given_key_is_no_key_on_first_use() -> None:
    one, told = witness(None, KEY.public)
    with pytest.raises(HandshakeError, match="this worker knows"):
        show(one, BODIES, key=OTHER_KEY)
    show(one, BODIES)
    assert told == []


def test_who_signed_once_has_to_go_on(tmp_path: Path) -> None:
    """Else a coordinator would be rid of its promises by leaving them out."""
    for one, size in ((witness(None, KEY.public)[0], 3), (witness(tmp_path)[0], 9)):
        if size == 9:
            one.expect(0, signs=False)
            show(one, BODIES, 4)
        with pytest.raises(HandshakeError, match="does not sign"):
            one.expect(size, signs=False)


def test_what_is_signed_must_be_what_was_sent() -> None:
    one, _ = witness(None)
    with pytest.raises(HandshakeError, match="does not sign the 7 entries that it sent"):
        one.take(position_of(BODIES[:7]).history, answer(forked(5), 7, 0))
    ours = position_of(BODIES[:7]).history
    lies = answer(BODIES, 7, 0)
    lies.head.root = bytes(32)
    with pytest.raises(HandshakeError, match="does not sign"):
        one.take(ours, lies)


@pytest.mark.parametrize("field", ["key", "signature"])
@pytest.mark.parametrize("value", [b"", b"x" * 31, bytes(64)])
def test_a_signature_that_is_none_is_refused(field: str, value: bytes) -> None:
    one, _ = witness(None)
    bad = answer(BODIES, 7, 0)
    setattr(bad.head, field, value)
    with pytest.raises(HandshakeError, match="is not valid"):
        one.take(position_of(BODIES[:7]).history, bad)
    assert one.known_size == 0


def test_a_signature_for_another_run_is_refused() -> None:
    one, _ = witness(None)
    ours = position_of(BODIES).history
    bad = answer(BODIES, SIZE, 0)
    bad.head.signature = heads.sign(KEY, bytes(32), ours).value
    with pytest.raises(HandshakeError, match="is not valid"):
        one.take(ours, bad)


def test_the_kept_file_is_for_its_owner_and_evidence(tmp_path: Path) -> None:
    show(witness(tmp_path / "new")[0], BODIES, 5)
    (path,) = (tmp_path / "new").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    kept = KeptHead.from_json(path.read_bytes())
    assert kept.head == position_of(BODIES[:5]).history
    assert kept.signature.key == KEY.public


def test_a_file_that_cannot_be_used_stops_the_worker(tmp_path: Path) -> None:
    """It would be an easy way to forget."""
    show(witness(tmp_path)[0], BODIES)
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    path.write_text(whole.replace('"size": 1', '"size": 2'))
    with pytest.raises(LorandError, match="restore the file, or remove it"):
        witness(tmp_path)
    ours = Head(1, bytes(32), bytes(32))
    path.write_text(KeptHead(bytes(32), ours, heads.sign(KEY, bytes(32), ours)).to_json())
    with pytest.raises(LorandError, match="is of another run"):
        witness(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(LorandError, match="restore the file, or remove it"):
        witness(tmp_path)


def test_a_folder_that_cannot_be_written_is_our_error(tmp_path: Path) -> None:
    one, _ = witness(tmp_path / "file")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LorandError, match="cannot keep the run's history"):
        show(one, BODIES)
