"""Which claims of the papers hold on our data: their figure, ours, and the difference.

Published figures are quoted with where they were read. Ours come from results files alone, so that
a row changes with them; `report.py` puts the table into docs/results.md. A difference counts when
it is larger than two of its standard errors.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any, Final

from experiments import byzantine, cells, codecs_and_pool, presets, tasks
from experiments.cells import first_at, mean_and_error
from lorand import wire_size
from lorand.config import RunConfig
from lorand_coordinator.presets import render

ACCURACY, LOSS = cells.COLUMNS.index("accuracy"), cells.COLUMNS.index("loss")
COUNTS: Final = 2
"""Standard errors beyond which a difference is one."""
TOTAL_SEEDS_BYTES: Final = 16384 + 1600
"""FedKSeed's round by its paper: 4,096 float32 down, 200 pairs of seed and float32 up."""
CLOSE: Final = 0.01
"""Cosines this close to √(K/d), relatively and rounded, are equal to it."""


@dataclass(frozen=True)
class Claim:
    """A row: what a paper says and where that was read, what was measured, and whether it holds."""

    paper: str
    says: str
    read: str
    here: str
    holds: str
    results: str

    def line(self) -> str:
        """Return it as a row of Markdown."""
        link = f"[{self.results}](../experiments/results/{self.results}.md)"
        return f"| {self.paper} | {self.says} | {self.read} | {self.here} | {self.holds} | {link} |"


def claims() -> Iterator[Claim]:
    """Yield all claims that were looked at, also those that nothing was run for."""
    yield from (byte_a_scalar(), own_directions())
    yield from (pool_sizes(), fixed_pool(), weighted_drawing(), seeds_bytes())
    yield from (first_order_steps(), rounds_needed(), cosine())
    yield from (one_bit_vote(), vote_of_liars(), several_directions(), fewer_passes())


def verdict(differences: Sequence[tuple[float, float]], better: bool = False) -> str:
    """Return whether all are no worse (or, where the paper says so, better) than 0."""
    held = [m > COUNTS * error if better else m >= -COUNTS * error for m, error in differences]
    return "yes" if all(held) else "in part" if any(held) else "no"


def _shown(found: dict[str, tuple[float, float]]) -> str:
    return "; ".join(f"{name} {mean:+.3f} ± {error:.3f}" for name, (mean, error) in found.items())


# -- codecs and pools: rows of the same draws, so that differences are of pairs ------------------


def _row(part: str, name: str, preset: str, task: str) -> list[dict[str, Any]]:
    found = (
        row
        for row in codecs_and_pool.rows()
        if (row.part, row.name, row.preset, row.task) == (part, name, preset, task)
    )
    return codecs_and_pool.reported(next(found))


def _paired(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[float, float]:
    """Return how much more accurate one is, seed by seed."""
    known = {cell["seed"]: cell["points"][-1][ACCURACY] for cell in other}
    return mean_and_error(
        cell["points"][-1][ACCURACY] - known[cell["seed"]] for cell in one if cell["seed"] in known
    )


PLACES: Final = (("lorand-zo", "subj"), ("lorand-zo", "uci"), ("lorand-fo", "uci"))


def byte_a_scalar() -> Claim:
    """Just One Byte: a byte a gradient is enough."""
    found = {
        f"{preset}, {task}": _paired(
            _row("codec", "int8", preset, task), _row("codec", "int32", preset, task)
        )
        for preset, task in PLACES
    }
    return Claim(
        "Just One Byte",
        "a byte a gradient is enough; no figures (and its code sends decimal text)",
        "abstract and code",
        f"accuracy of int8 over int32: {_shown(found)}",
        verdict(list(found.values())),
        "codecs_and_pool",
    )


def own_directions() -> Claim:
    """Just One Byte: each worker directions of its own."""
    found = _lower_losses("just-one-byte", "mezo")
    return Claim(
        "Just One Byte",
        "each worker its own directions, all scalars to all; no figures",
        "abstract and code",
        f"loss below one direction shared by all (`mezo`), equal passes: {_shown(found)}",
        verdict(list(found.values())),
        "presets",
    )


def pool_sizes() -> Claim:
    """FedKSeed: K of some thousands, neither smaller nor larger."""
    sizes = [f"K = {size:,}" for size in codecs_and_pool.POOL_SIZES]
    parts, ends = [], []
    for preset, task in (PLACES[0], PLACES[2]):
        usual = _row("K", "K = 4,096", preset, task)
        found = {
            name: _paired(_row("K", name, preset, task), usual) for name in (sizes[0], sizes[-1])
        }
        ends += list(found.values())
        parts.append(f"{preset}, {task}: {_shown(found)}")
    lost = sum(mean < -COUNTS * error for mean, error in ends)
    return Claim(
        "FedKSeed",
        "K = 4,096 serves; too few or too many directions hurt",
        "memory, not verified",
        f"accuracy over that of K = 4,096: {'. '.join(parts)}",
        f"{lost} of {len(ends)} ends lose: {PLACES[2][0]}'s",
        "codecs_and_pool",
    )


def fixed_pool() -> Claim:
    """FedKSeed: a fixed pool costs little."""
    found = {
        task: _paired(
            _row("pool", "one pool", "lorand-zo", task),
            _row("pool", "another each round", "lorand-zo", task),
        )
        for task in ("subj", "uci")
    }
    return Claim(
        "FedKSeed",
        "one pool for the whole run does as well as fresh directions",
        "paper's method",
        f"accuracy of one pool of 4,096 over another each round: {_shown(found)}",
        verdict(list(found.values())),
        "codecs_and_pool",
    )


# -- presets: equal forward passes, each at its own best rate --------------------------------------


def _lower_losses(one: str, other: str) -> dict[str, tuple[float, float]]:
    """Return how much lower one's loss ends, by task."""
    found = {}
    for task in tasks.LABELS:
        ends = [
            mean_and_error(curve[-1].score.loss for curve in presets.reported(name, task))
            for name in (one, other)
        ]
        (ours, error), (theirs, their_error) = ends
        found[task] = (theirs - ours, (error**2 + their_error**2) ** 0.5)
    return found


def weighted_drawing() -> Claim:
    """FedKSeed-Pro: weighted drawing against uniform."""
    found = _lower_losses("fedkseed-pro", "fedkseed")
    return Claim(
        "FedKSeed-Pro",
        "drawing by past slopes serves with K = 1,024",
        "second hand and code",
        f"loss below uniform drawing from 4,096, 15 local steps a round: {_shown(found)}",
        verdict(list(found.values())),
        "presets",
    )


def seeds_bytes() -> Claim:
    """FedKSeed: 18 KB a round."""
    size = wire_size.of_round(RunConfig.parse(render("fedkseed")), presets.WORKERS)
    up, down = size.up.payload, size.down.payload
    return Claim(
        "FedKSeed",
        f"{TOTAL_SEEDS_BYTES:,} bytes a round (K = 4,096, 200 local steps)",
        "calculated from the paper",
        f"the preset, by formula: {up:,} bytes up and, for {presets.WORKERS} workers, {down:,} "
        "down: indices follow from the round, and only what was measured comes back",
        "yes" if up + down <= TOTAL_SEEDS_BYTES else "no",
        "wire_bytes",
    )


def first_order_steps() -> Claim:
    """Ferret: first-order local steps get further."""
    found = _lower_losses("ferret", "fedkseed")
    return Claim(
        "Ferret",
        "Rouge-L against FedKSeed's: GSM8K 36.10 and 28.26, Natural Instructions 24.99 and 22.33, "
        "Dolly 30.63 and 30.91",
        "paper",
        f"loss below FedKSeed's, equal passes: {_shown(found)}",
        verdict(list(found.values()), better=True),
        "presets",
    )


def rounds_needed() -> Claim:
    """Ferret: fewer rounds."""
    shown, times = [], []
    for task in tasks.LABELS:
        theirs = presets.reported("fedkseed", task)
        level = fmean(curve[-1].score.accuracy for curve in theirs)
        reached = first_at(presets.reported("ferret", task), level)
        rounds = theirs[0][-1].committed
        times.append(rounds / reached.committed if reached else 0.0)
        shown.append(f"{task} {reached.committed if reached else 'not reached'} of {rounds}")
    return Claim(
        "Ferret",
        "12 rounds where FedKSeed takes 40: 3.3 times fewer",
        "paper",
        f"scored rounds to FedKSeed's last accuracy: {', '.join(shown)}",
        "yes" if min(times) >= 40 / 12 else "in part" if max(times) > 1 else "no",
        "presets",
    )


def cosine() -> Claim:
    """Ferret: a gradient from K of d directions has the cosine √(K/d)."""
    content = json.loads((cells.RESULTS / "privacy_audit.json").read_text(encoding="utf-8"))
    rows = [row for row in content["parts"]["A1"]["first_order"] if row["codec"] == "float"]
    found = {(r["dimension"], r["scalars"]): (r["cosine"][0], r["theory"]) for r in rows}
    shown = (f"d = {d:,}, K = {k:,}: {is_:.3f} ({be:.3f})" for (d, k), (is_, be) in found.items())
    equal = all(abs(is_ - be) <= max(CLOSE * be, 5e-4) for is_, be in found.values())
    return Claim(
        "Ferret",
        "what K scalars say of a vector of d numbers has a cosine of about √(K/d) with it",
        "follows from its theorem",
        "; ".join(shown),
        "yes" if equal else "no",
        "privacy_audit",
    )


def one_bit_vote() -> Claim:
    """FeedSign: one bit each way comes close to whole scalars."""
    found = _lower_losses("feedsign", "mezo")
    return Claim(
        "FeedSign",
        "one bit each way, 1/64 of the message, near whole scalars",
        "second hand",
        f"loss below whole scalars' (`mezo`), equal passes: {_shown(found)}",
        verdict(list(found.values())),
        "presets",
    )


def vote_of_liars() -> Claim:
    """FeedSign: a vote withstands one liar of five."""
    above = {}
    for rule in ("mean", "sign-vote"):
        for split, attack, count in (("alike", "flip x10", 1), ("alike", "flip x10", 3)):
            above[rule, count] = losses_above(rule, split, attack, count)
    shown = (
        f"{count} of 10: votes {above['sign-vote', count]:+.1%}, mean {above['mean', count]:+.1%}"
        for count in (1, 3)
    )
    held = all(above["sign-vote", each] < above["mean", each] for each in (1, 3))
    return Claim(
        "FeedSign",
        "withstands one of five that flips its sign",
        "second hand",
        f"loss above the clean mean's, tenfold flips: {'; '.join(shown)}",
        "in part: less is lost than by a mean" if held else "no",
        "byzantine",
    )


def losses_above(rule: str, split: str, attack: str, count: int) -> float:
    """Return by how much the last loss is above that of a mean without attackers, relatively."""
    last = _last_losses()
    name = byzantine.name_of(rule, split, attack, count)
    clean = byzantine.name_of("mean", split, byzantine.CLEAN, 0)
    return fmean(last[name, seed] / last[clean, seed] - 1 for seed in byzantine.SEEDS)


@cache
def _last_losses() -> dict[tuple[str, int], float]:
    return {
        (row["method"], row["seed"]): row["points"][-1][LOSS]
        for row in byzantine.STORE.read()["cells"]
        if row["purpose"] == "report"
    }


def several_directions() -> Claim:
    """DeComFL: several directions a step."""
    found = _lower_losses("decomfl", "mezo")
    last = presets.reported("decomfl", "uci")[0][-1]
    return Claim(
        "DeComFL",
        "OPT-125M on SST-2: 85.21 % for 22.9 KB a client in all",
        "second hand",
        f"{last.bytes_up + last.bytes_down:,} bytes of codes in {last.committed} rounds; loss "
        f"below one direction a step (`mezo`), equal passes: {_shown(found)}",
        verdict(list(found.values())),
        "presets",
    )


def fewer_passes() -> Claim:
    """FZOO: fewer passes than MeZO."""
    found = _lower_losses("fzoo", "mezo")
    return Claim(
        "FZOO",
        "3 times fewer forward passes than MeZO on average",
        "abstract",
        f"loss below MeZO's, equal passes: {_shown(found)}",
        verdict(list(found.values()), better=True),
        "presets",
    )
