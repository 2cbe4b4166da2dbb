"""What a worker reads ahead: order, bytes, how much, its end, and which rounds are over by it."""

import threading
from collections.abc import Callable, Iterator

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorand.errors import LedgerError
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_worker import inbox
from lorand_worker.inbox import Inbox, Message

LIMIT_S = 30.0


class Call:
    """A call that gives messages as fast as they are taken, then ends or fails."""

    def __init__(self, messages: list[Message], error: grpc.RpcError | None = None) -> None:
        self._messages, self._error = messages, error
        self.taken = 0
        self.ended = threading.Event()

    def __iter__(self) -> Iterator[Message]:
        try:
            for message in self._messages:
                self.taken += 1
                yield message
            if self._error is not None:
                raise self._error
        finally:
            self.ended.set()


def start(round_index: int) -> Message:
    return Message(round_start=wire.RoundStart(round_index=round_index))


def commit(round_index: int) -> Message:
    return _entry(pb.Entry(round_index=round_index, commit=pb.Commit(scale=1)))


def abandon(round_index: int) -> Message:
    return _entry(pb.Entry(round_index=round_index, abandon=pb.Abandon(reason="few")))


def member(round_index: int) -> Message:
    return _entry(pb.Entry(round_index=round_index, member=pb.Member(worker=1, name="a")))


def _entry(entry: pb.Entry) -> Message:
    return Message(entry=entry.SerializeToString())


def batch(*messages: Message) -> Message:
    return Message(batch=wire.Batch(messages=messages))


def nowhere(size: int) -> None:
    """Count nothing."""


def all_there(call: Call, count: int) -> bool:
    return call.ended.wait(LIMIT_S) and call.taken == count


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), max_size=20))
def test_messages_come_in_order_and_are_counted(rounds: list[list[int]]) -> None:
    """Those of a batch one by one, its bytes as they were on the way."""
    sizes: list[int] = []
    messages = [batch(*map(start, part)) if part[1:] else start(part[0]) for part in rounds]
    found = [m.round_start.round_index for m in Inbox(Call(messages), sizes.append)]
    assert found == [index for part in rounds for index in part]
    assert sizes == [message.ByteSize() for message in messages]


def test_what_came_before_a_failure_is_read_first() -> None:
    error = grpc.RpcError("gone")
    reading = iter(Inbox(Call([start(1)], error), nowhere))
    assert next(reading) == start(1)
    with pytest.raises(grpc.RpcError) as raised:
        next(reading)
    assert raised.value is error


@pytest.mark.parametrize("end", [commit, abandon])
@pytest.mark.parametrize("together", [False, True], ids=["apart", "in one batch"])
def test_a_round_that_ended_meanwhile_is_over(
    end: Callable[[int], Message], together: bool
) -> None:
    """And the one that began behind it is not."""
    messages = [start(1), member(1), end(1), start(2), member(2)]
    call = Call([batch(*messages)] if together else messages)
    box = Inbox(call, nowhere)
    assert all_there(call, 1 if together else 5)
    told = [
        (m.round_start.round_index, box.is_over(m.round_start.round_index))
        for m in box
        if m.HasField("round_start")
    ]
    assert told == [(1, True), (2, False)]


def test_a_worker_far_behind_begins_with_the_newest_round() -> None:
    """Whatever number of rounds went by while it measured one."""
    messages = [m for r in range(1, 100) for m in (start(r), batch(commit(r)))] + [start(100)]
    call = Call(messages)
    box = Inbox(call, nowhere)
    assert all_there(call, len(messages))
    starts = [m.round_start.round_index for m in box if m.HasField("round_start")]
    again = Inbox(call := Call(messages), nowhere)
    assert all_there(call, len(messages))
    measured = [
        m.round_start.round_index
        for m in again
        if m.HasField("round_start") and not again.is_over(m.round_start.round_index)
    ]
    assert (len(starts), measured) == (100, [100])


def test_a_damaged_entry_is_no_silent_end() -> None:
    call = Call([start(1), Message(entry=b"\xff")])
    box = Inbox(call, nowhere)
    assert all_there(call, 2)
    with pytest.raises(LedgerError, match="cannot be read"):
        [box.is_over(1) for _ in box]


def test_no_more_is_read_ahead_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest waits with the coordinator, whose silence that is not; closing ends the reader."""
    monkeypatch.setattr(inbox, "AHEAD", 4)
    monkeypatch.setattr(inbox, "CLOSED_POLL_S", 0.01)
    call = Call([start(r) for r in range(100)])
    box = Inbox(call, nowhere)
    reading = iter(box)
    assert next(reading) == start(0)
    assert not box.is_over(0)
    full = threading.Event()
    monkeypatch.setattr(box, "_closed", _Closing(box._closed, full))
    assert full.wait(LIMIT_S), "the reader waits for room"
    assert call.taken <= 1 + 2 * 4 + 2
    assert box.silent_s() == 0.0
    box.close()
    (reader,) = [t for t in threading.enumerate() if t.name == "inbox"]
    reader.join(LIMIT_S)
    assert not reader.is_alive()


class _Closing:
    """An inbox's word that it is closed, which tells when the reader has asked for it often."""

    def __init__(self, event: threading.Event, often: threading.Event) -> None:
        self._event, self._often, self._asked = event, often, 0

    def is_set(self) -> bool:
        self._asked += 1
        if self._asked > 10:
            self._often.set()
        return self._event.is_set()

    def set(self) -> None:
        self._event.set()
