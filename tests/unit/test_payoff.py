"""Whether a subspace pays: figures against quadratics where they are known, and what follows."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.runs import hello
from tests.unit.landscape import PARTICIPANTS, Landscape, compare, probed

from lorand import codec, ledger
from lorand.config import RunConfig
from lorand.errors import LedgerError
from lorand.ledger import Position
from lorand.manifest import Identity, Manifest, TensorSpec
from lorand.subspaces import periods
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import history, payoff, show
from lorand_coordinator.aggregation import Report
from lorand_coordinator.payoff import AFTER_FIRST, SIDE, Comparison, Rounds, kept
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.store import SqliteStore

SIZE: Final = 400
SECOND: Final = periods.PROBE_EVERY + SIDE
"""The period after which the second probe has been compared."""
THIRD: Final = SECOND + periods.PROBE_EVERY
PART: Final = np.arange(SIZE // 4)


def landscape(seed: int, **changes: Any) -> Landscape:
    rng = np.random.default_rng(1000 + seed)
    return Landscape(rng.normal(size=SIZE), rng.uniform(0.2, 2, SIZE), **changes)


def keeping(kappa: float, seed: int, **changes: Any) -> Landscape:
    """A landscape whose first quarter keeps so much of the progress: alpha = kappa · h."""
    made = landscape(seed, **changes)
    alpha = kappa * made.bend(PART)
    here, all_ = (made.slopes[PART] ** 2).sum(), (made.slopes**2).sum()
    made.slopes[PART] *= np.sqrt(alpha / (1 - alpha) * (all_ - here) / here)
    return made


def drawn(seed: int, count: int = THIRD + 1) -> list[NDArray[np.int64]]:
    """A random eighth of the coordinates a period."""
    rng = np.random.default_rng(seed)
    return [rng.choice(SIZE, SIZE // 8, replace=False) for _ in range(count)]


# ------------------------------------------------------------- figures


@pytest.mark.parametrize("kappa", [0.3, 1.0, 2.0])
def test_what_a_subspace_keeps_is_found(kappa: float) -> None:
    """Of many landscapes: alpha, h and kappa, and their errors are how far off they are."""
    config = probed(8)
    off: list[tuple[float, ...]] = []
    for seed in range(40):
        made = keeping(kappa, seed)
        found = kept(compare(config, made, PART, THIRD, seed))
        assert found.energy
        assert found.curvature
        assert found.progress
        truth = (made.energy(PART), made.bend(PART), kappa)
        pairs = zip((found.energy, found.curvature, found.progress), truth, strict=True)
        off.append(tuple((value - true) / error for (value, error), true in pairs))
    assert np.abs(np.mean(off, axis=0)).max() < 0.6
    spread = np.std(off, axis=0)
    assert spread.min() > 0.7
    assert spread.max() < 1.5


def test_a_drift_is_no_difference() -> None:
    """Gradients that fall to two thirds over eight periods: a random subspace is as good."""
    config, off = probed(8), []
    for seed in range(30):
        made = landscape(seed, fade=1 - 0.05 / 8)
        found = kept(compare(config, made, drawn(seed), THIRD, seed)).progress
        if found is not None:
            off.append((found[0] - 1) / found[1])
    assert len(off) >= 25
    assert abs(np.mean(off)) < 0.8


@pytest.mark.parametrize("rounds", [4, 16])
def test_a_random_subspace_is_never_given_up(rounds: int) -> None:
    """Kappa is near 1, over seeds and ten probes, with scales of codes that have to follow."""
    config = probed(rounds, subspace={"switch_off": True})
    last = 10 * periods.PROBE_EVERY + SIDE if rounds == 4 else THIRD
    found = []
    for seed in range(15):
        seen = compare(config, landscape(seed), drawn(seed, last + 1), last, seed)
        assert not seen.given_up
        found.append(kept(seen).progress)
    known = [progress[0] for progress in found if progress]
    assert len(known) >= 14
    assert np.mean(known) == pytest.approx(1.0, abs=0.15)


def test_a_subspace_without_gradient_is_given_up() -> None:
    for seed in range(10):
        config = probed(8, subspace={"switch_off": True})
        seen = compare(config, keeping(0.0, seed), PART, SECOND, seed)
        assert seen.given_up
        again = compare(probed(8), keeping(0.0, seed), PART, SECOND, seed)
        assert not again.given_up, "the run does not ask for it"
        assert payoff.fails(again)


def test_nothing_is_given_up_before_the_second_probe() -> None:
    config = probed(16, subspace={"switch_off": True})
    before = compare(config, keeping(0.0, 1), PART, SECOND - 1, 1)
    assert (before.probes, before.given_up) == (1, False)
    assert kept(before).progress is None
    assert payoff.findings(config, before) == []


def test_after_giving_up_nothing_is_compared() -> None:
    config = probed(8, subspace={"switch_off": True})
    seen = compare(config, keeping(0.0, 2), PART, SECOND, 2)
    assert seen.given_up
    assert compare(config, keeping(0.0, 2), PART, THIRD, 2) == seen


def test_clipped_rounds_and_rounds_without_curvature_are_left_out() -> None:
    config = probed(8)
    fine = [Report(np.array([3, -5, 2, 8, 1, 7, -2, 6])) for _ in range(2)]
    ends = [Report(np.array([127, -5, 2, 8, 1, 7, -2, 6])) for _ in range(2)]
    seen = payoff.after(config, Comparison(), 0, 0, fine, [2.0, 4.0])
    assert seen.now == Rounds(1, seen.now.x, 3.0, seen.now.x**2, 9.0, 3 * seen.now.x)
    assert payoff.after(config, seen, 1, 0, fine, []) == seen
    assert payoff.after(config, seen, 1, 0, ends, [2.0]) == seen


POWERS: Final = st.integers(-12, 12)


@given(POWERS, POWERS, st.integers(0, 3))
def test_units_do_not_matter(slopes: int, curvatures: int, seed: int) -> None:
    """Scalars and curvatures of another size, by powers of two: the same ratios, bit for bit."""
    config = probed(4)
    rng = np.random.default_rng(seed)
    one = other = Comparison()
    for done in range(4 * (SECOND + 1)):
        codes = [rng.integers(-100, 100, 8) for _ in range(PARTICIPANTS)]
        met = [float(x) for x in rng.uniform(1, 3, PARTICIPANTS)]
        reports = [Report(part) for part in codes]
        one = payoff.after(config, one, done, 0, reports, met)
        scaled = [x * 2.0**curvatures for x in met]
        other = payoff.after(config, other, done, slopes, reports, scaled)
    assert kept(one) == kept(other)
    assert one.probes == 2


def test_the_value_at_a_probe_is_that_of_a_line() -> None:
    """Its value at 0 is exact, and without spread, where all points are on it."""
    rounds = []
    for period in range(SECOND + 1):
        x = 8.0 - period / 4
        rounds.append(Rounds(1, x, 2 * x, x * x, 4 * x * x, 2 * x * x))
    places = [*range(-SIDE, 0), *range(1, SIDE + 1)]
    pair, spread = payoff._at_zero([(k, rounds[periods.PROBE_EVERY + k]) for k in places])
    assert (pair.slope, pair.curvature) == pytest.approx((6.0, 12.0))
    assert pair.slope_variance == pytest.approx(0.0, abs=1e-20)
    assert spread == pytest.approx(1 / 6)
    pair, spread = payoff._at_zero([(k, rounds[k]) for k in range(1, AFTER_FIRST + 1)])
    assert (pair.slope, pair.curvature) == pytest.approx((8.0, 16.0))
    assert spread == pytest.approx(1 / 4 + 2.5**2 / 5)


# ------------------------------------------------------------- sentences


def test_a_finding_says_what_to_do() -> None:
    config = probed(8)
    bad = compare(config, keeping(0.2, 3), PART, THIRD, 3)
    (finding,) = payoff.findings(config, bad)
    assert finding.warning
    assert "of the gradient's energy and" in finding.text
    assert "of the progress of one in full space; it does not pay" in finding.text
    (told,) = payoff.findings(config, replace(bad, given_up=True))
    assert not told.warning
    assert told.text.endswith("given it up and goes on in full space")
    (fine,) = payoff.findings(config, compare(config, keeping(2.0, 3), PART, THIRD, 3))
    assert (fine.warning, fine.text.endswith("it pays, keep it")) == (False, True)
    between = replace(bad, inside=replace(bad.inside, slope_variance=bad.full.slope**2))
    (unsure,) = payoff.findings(config, between)
    assert not unsure.warning
    assert "see again after more probes" in unsure.text
    flat = replace(bad, inside=replace(bad.inside, curvature=0.0))
    (unknown,) = payoff.findings(config, flat)
    assert "raise estimator.perturbation_scale" in unknown.text


# ------------------------------------------------------------- in the ledger

MATRIX: Final = Manifest((TensorSpec("w", (20, 20), "float32", 0, 5),))
IDENTITY: Final = Identity(b"\1" * 32, b"\2" * 32, MATRIX)


class Run:
    """A sequencer, and two workers that measure a landscape where the ledger tells them to."""

    def __init__(self, kappa: float, path: str = ":memory:", **changes: Any) -> None:
        self.config: RunConfig = probed(4, 12, subspace={"switch_off": True}, **changes)
        self.store = SqliteStore(Path(path) if path != ":memory:" else path)
        self.sequencer = Sequencer(self.config, self.store, IDENTITY)
        self.landscape = keeping(kappa, 1)
        self.rng = np.random.default_rng(5)
        for name in ("ada", "ben"):
            number, _ = self.sequencer.admit(hello(self.position, name))
            self.sequencer.connect(number, 0.0)

    @property
    def position(self) -> Position:
        assert self.sequencer.position is not None
        return self.sequencer.position

    def commit(self, rounds: int) -> None:
        for _ in range(rounds):
            round_index = self.sequencer.engine.round_index
            whole = self.position.pool(len(self.position.closed)).basis is None
            at = np.arange(SIZE) if whole else PART
            count = self.config.num_directions
            scalars, met = self.landscape.measure(at, 0, count, self.rng)
            for worker, (part, curvature) in enumerate(zip(scalars, met, strict=True), 1):
                codes = codec.encode("int8", part, self.sequencer._optimizer.scale_exponent)
                message = pb.Contribution(
                    round_index=round_index,
                    codes=codec.pack("int8", codes),
                    loss=0.5,
                    curvature=curvature,
                )
                request = wire.ParticipateRequest(contribution=message)
                self.sequencer.receive(worker, request, 0.0)

    def until_given_up(self) -> int:
        """Commit periods until the run gives its subspace up; return how many were committed."""
        while self.position.elections.given_up is None:
            assert self.position.committed < 4 * 100
            self.commit(4 - self.position.committed % 4)
        return self.position.committed

    def gives_up(self) -> list[bool]:
        entries = (ledger.parse(body) for body in self.store.entries())
        return [e.commit.gives_up_subspace for e in entries if e.HasField("commit")]


@pytest.fixture
def bad() -> Iterator[Run]:
    run = Run(0.1)
    with closing(run.store):
        yield run


def test_the_commit_that_ends_a_period_gives_the_subspace_up(bad: Run) -> None:
    committed = bad.until_given_up()
    assert committed % 4 == 0
    period = committed // 4
    assert bad.position.elections.given_up == period
    assert (period - 1 - SIDE) % periods.PROBE_EVERY == 0, "a probe was complete"
    bad.commit(9)
    assert bad.gives_up() == [n == committed for n in range(1, committed + 10)]


def test_a_late_joiner_goes_on_in_full_space(bad: Run) -> None:
    """Whoever reads the ledger has the same directions, of the period and of all that follow."""
    committed = bad.until_given_up()
    bad.commit(5)
    late = ledger.replay(bad.store.entries())
    number = len(late.closed)
    assert late.pool(number).basis is None
    assert not periods.in_full_space(late.config, periods.period(late.config, number))
    assert late.pool(number - 2).basis is not None
    assert late.pool(number).key == bad.position.pool(number).key
    assert not late.elections.probing(late.config), "no curvature is measured any more"
    assert late.committed == committed + 5


def test_after_giving_up_no_curvature_is_kept(bad: Run) -> None:
    bad.until_given_up()
    bad.commit(1)
    kept_of = {True: 0, False: 0}
    for body in bad.store.entries():
        for part in bad.store.contributions(ledger.parse(body).sequence):
            stored = pb.StoredContribution.FromString(part)
            kept_of[stored.contribution.HasField("curvature")] += 1
    assert kept_of[False] == PARTICIPANTS


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_curvature_that_is_no_number_is_dropped(value: float) -> None:
    for probing, expected in [(True, False), (False, False)]:
        message = pb.Contribution(curvature=value)
        payoff.drop_unasked(message, probing=probing)
        assert message.HasField("curvature") == expected
    message = pb.Contribution(curvature=2.0)
    payoff.drop_unasked(message, probing=True)
    assert message.curvature == 2.0
    payoff.drop_unasked(message, probing=False)
    assert not message.HasField("curvature")


@pytest.mark.parametrize("after", [0, 3, 4 * AFTER_FIRST + 1, 4 * SECOND + 3])
def test_a_restart_repeats_the_comparison(bad: Run, after: int) -> None:
    """Wherever it stops: the same figures, and the same commit gives up."""
    bad.commit(after)
    before = bad.sequencer.comparison
    bad.sequencer = Sequencer(bad.config, bad.store, None)
    assert bad.sequencer.comparison == before
    for number in (1, 2):
        bad.sequencer.connect(number, 0.0)
    committed = bad.until_given_up()
    bad.commit(2)
    again = Sequencer(bad.config, bad.store, None)
    assert again.comparison == bad.sequencer.comparison
    assert again.comparison.given_up
    whole = Run(0.1)
    with closing(whole.store):
        assert whole.until_given_up() == committed


@pytest.mark.parametrize("gives_up", [True, False])
def test_giving_up_that_does_not_follow_is_refused(bad: Run, gives_up: bool) -> None:
    """The entry rewritten to fit the chain: the stored contributions give it away."""
    if gives_up:
        bad.commit(8)
    else:
        bad.until_given_up()
    entry = ledger.parse(list(bad.store.entries())[-1])
    entry.commit.gives_up_subspace = gives_up
    body = entry.SerializeToString(deterministic=True)
    digest = ledger.entry_digest(bad.store.digest(entry.sequence - 1), body)
    bad.store._database.execute(
        "UPDATE entry SET body = ?, digest = ? WHERE sequence = ?", (body, digest, entry.sequence)
    )
    with pytest.raises(LedgerError, match="does not repeat to what the ledger holds"):
        Sequencer(bad.config, bad.store, None)


def test_the_ledger_tells_what_the_coordinator_tells(tmp_path: Path) -> None:
    run = Run(0.1, str(tmp_path / "small.ledger"))
    run.until_given_up()
    config, rounds = history.read(tmp_path / "small.ledger")
    seen = Comparison()
    for part in rounds:
        reports = list(part.reports.values())
        seen = payoff.after(
            config, seen, part.committed, part.scale_exponent, reports, part.curvatures
        )
    assert seen == run.sequencer.comparison
    content = show.figures(run.sequencer.recent, seen)
    assert content["subspace"]["given_up"] is True
    assert content["subspace"]["progress"] == list(kept(seen).progress or ())
    assert [f.text for f in run.sequencer.findings()] == content["findings"]
    assert "the run has given it up" in " ".join(content["findings"])
    run.store.close()
