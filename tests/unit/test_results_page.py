"""docs/results.md is what the results files say."""

from dataclasses import replace

import pytest
from experiments import cells, papers, report, scaling, skewed
from experiments.federation import Point
from experiments.grid import Reported

from lorand_worker.tasks import Score


def test_the_page_is_what_the_results_say() -> None:
    assert report.PAGE.read_text(encoding="utf-8") == report.page(), "run `make docs`"


def test_what_was_not_run_is_said_to_be() -> None:
    page = report.page()
    assert page.count("Not run: ") >= 2
    assert cells.load(report.PAGE.parent / "no-such.json") == {}
    assert report.rows_of("no-such") == []


def curve(*accuracies: float) -> list[Point]:
    return [Point(at, Score(each, 0.5, 10), at) for at, each in enumerate(accuracies)]


def test_the_first_point_as_accurate_is_of_the_mean() -> None:
    curves = [curve(0.5, 0.7, 0.9, 0.9), curve(0.5, 0.5, 0.7, 0.9)]
    found = cells.first_at(curves, 0.8)
    assert found is not None
    assert found.committed == 2
    assert cells.first_at(curves, 0.95) is None


@pytest.mark.parametrize(
    ("accuracies", "said"),
    [
        ((0.5, 0.8, 0.9), "met: 50 times fewer (200 and 10,000; LoRand, 1 bit; uci, 1 seeds)"),
        ((0.5, 0.8, 0.8), "**not reached**: none is as accurate"),
    ],
)
def test_fewer_bytes_than_lora_are_those_at_its_accuracy(
    accuracies: tuple[float, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = [Point(at, Score(at * 0.45, 0.5, 10), 0, 2500 * at, 2500 * at) for at in range(3)]
    ours = [replace(point, bytes_up=100 * point.committed) for point in curve(*accuracies)]
    rows = [
        Reported("uci", "FedAvg, LoRA r = 8", 1e-3, [theirs]),
        Reported("uci", "LoRand, 1 bit", 1e-3, [ours]),
    ]
    monkeypatch.setattr(report, "rows_of", lambda name: rows if name == "quick" else [])
    assert report.against_lora().startswith(said)


@pytest.mark.parametrize(
    ("bytes_each", "accuracy", "said"),
    [
        (100, 0.9, "met: subj, FedKSeed, 15 steps: 10.0 times fewer bytes, 0.40 of the passes"),
        (
            300,
            0.9,
            "**not reached**: subj, FedKSeed, 15 steps: 3.3 times fewer bytes, 0.40 of the passes",
        ),
        (100, 0.8, "**not reached**: subj, FedKSeed, 15 steps: never, .800 ± .000 and .900 ± .000"),
    ],
)
def test_half_of_the_passes_are_those_at_the_accuracy_of_fedkseed(
    bytes_each: int, accuracy: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = [Point(at, Score(at * 0.45, 0.5, 10), 5 * at, 500 * at, 500 * at) for at in range(3)]
    ours = [replace(p, bytes_up=bytes_each * p.committed) for p in curve(0.5, 0.6, accuracy)]
    ours = [replace(p, forwards=2 * p.committed) for p in ours]
    rows = [
        Reported(task, method, 1e-3, [run])
        for task in ("subj", "mr", "uci")
        for method, run in (("FedKSeed, 15 steps", theirs), ("LoRand, zeroth order", ours))
    ]
    monkeypatch.setattr(report, "rows_of", lambda _: rows)
    assert report.against_fedkseed().startswith(said)
    del rows[-1]
    assert report.against_fedkseed().startswith("**not reached**")
    assert report.against_fedkseed().endswith("uci not run")


@pytest.mark.parametrize(
    ("accuracies", "bytes_a_round", "said"),
    [
        ((0.5, 0.8, 0.9), 16384, "met: "),
        ((0.5, 0.8, 0.8), 16384, "**not reached**: 0.995 of it"),
        ((0.5, 0.8, 0.9), 900_000, "**not reached**: "),
    ],
)
def test_the_leanest_row_as_accurate_as_asked_is_held_against_fedavg(
    accuracies: tuple[float, ...],
    bytes_a_round: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = [replace(p, bytes_up=bytes_a_round * p.committed) for p in curve(*accuracies)]
    rows = [
        Reported(skewed.TARGET, "LoRand, head", 0.1, [ours]),
        Reported(skewed.TARGET, "FedAvg, head", 0.1, [curve(0.99)]),
        Reported("another task", "LoRand, head", 0.1, [curve(0.99)]),
    ]
    monkeypatch.setattr(report, "rows_of", lambda name: rows)
    found = report.against_fedavg("banking77")
    assert found.startswith(said)
    assert ("LoRand, head" in found) == (accuracies[-1] == 0.9)


def test_each_task_of_the_skewed_grid_is_a_line() -> None:
    def reported(task: str, method: str, size: int, best: float = 0.9) -> Reported:
        points = [replace(p, bytes_down=size * p.committed) for p in curve(0.5, best)]
        return Reported(task, method, 0.1, [points])

    rows = [
        reported("50 workers", "FedAvg, head", 7000),
        reported("50 workers", "FedAvg, head, 10 a round", 1000, 0.8),
        reported("50 workers", "LoRand, head", 100),
        reported("50 workers", "LoRand, head, 10 a round", 50),
        reported("3 workers", "FedAvg, head", 7000),
    ]
    lines = [line for line in skewed.lines(rows) if line.startswith("| ")][1:]
    assert lines == [
        "| 50 workers | .900 ± .000 | 1 | 7,000 | .900 ± .000 | 1 | 100 | 70.0 |",
        "| 50 workers, 10 a round | .800 ± .000 | 1 | 1,000 | .900 ± .000 | 1 | 50 | never |",
        "| 3 workers | .900 ± .000 | 1 | 7,000 | not run | |  |  |",
    ]
    assert list(skewed.lines([])) == []


def test_a_difference_counts_beyond_two_standard_errors() -> None:
    assert papers.verdict([(-0.01, 0.006)]) == "yes"
    assert papers.verdict([(-0.02, 0.006), (0.0, 0.006)]) == "in part"
    assert papers.verdict([(-0.02, 0.006)]) == "no"
    assert papers.verdict([(0.01, 0.006)], better=True) == "no"


def test_a_million_workers_are_calculated_from_a_thousand() -> None:
    row = scaling.EIGHT_SCALARS | {"workers": 1000, scaling.COST: 200.0}
    assert "Not calculated" in "\n".join(scaling.million({}, {}))
    lines = list(scaling.million({"rows": [row, row | {"workers": 10}]}, {}))
    assert lines[-4:] != list(scaling.million({}, {scaling.COST: 300.0}))[-4:]
    table = [line.split(" | ") for line in lines if line.startswith("| zeroth order")]
    assert [line[2:5] for line in table] == [
        ["1,000,000", "1", "0"],
        ["1,000", "2", "1,000"],
        ["100", "3", "10,100"],
    ]
    alone, two, three = (float(line[5].replace(",", "")) for line in table)
    assert alone > 200 > two > three
