"""What docs/results.md says of scale: many workers, large models, a million workers on paper."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from experiments import tree
from experiments.cells import RESULTS, link, load
from lorand.config import RunConfig

BENCHMARKS: Final = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def lines() -> Iterator[str]:
    """Yield rounds of 1 to 1,000 workers, kernels of growing models, and a tree on paper."""
    measured = load(RESULTS / "scale.json")
    yield from [
        "## Scale",
        "",
        *rounds(measured),
        "",
        *kernels(),
        "",
        *million(measured, load(BENCHMARKS / COORDINATOR)),
    ]


def rounds(measured: dict[str, Any]) -> Iterator[str]:
    """Yield what rounds of workers without models take, as scale.json has it."""
    if not measured:
        yield "Rounds of 1 to 1,000 workers: **not run** yet ([scale.py](../experiments/scale.py))."
        return
    yield "One coordinator process and all workers, without models, share a machine of two cores;"
    yield f"mutual TLS, every round durable before it is seen ({link('scale')}). The load average"
    yield f"was {measured['load'][0]:.1f} before."
    yield ""
    yield (
        "| run | workers | ms a round | coordinator, µs a worker-round | bytes a worker-round, "
        "up + down | formula |"
    )
    yield "|---|---|---|---|---|---|"
    for row in measured["rows"]:
        yield (
            f"| {row['name']} | {row['workers']:,} | {row['ms_a_round']:,.1f} | "
            f"{row['coordinator_us_a_worker_round']:,.0f} | {row['bytes_up']:,.0f} + "
            f"{row['bytes_down']:,.0f} | {row['predicted_up']:,} + {row['predicted_down']:,} |"
        )
    yield ""
    furthest = max(measured["rows"], key=apart)
    yield "A commit names its participants, so that bytes down grow with their number. Where the"
    yield f"formula and sockets are furthest apart, they are by {apart(furthest):.0%}:"
    yield f"{furthest['workers']:,} workers, {furthest['name']}."


def apart(row: dict[str, Any]) -> float:
    """Return by what share formula and sockets differ, up or down."""
    return max(
        abs(float(row[f"predicted_{way}"] / row[f"bytes_{way}"]) - 1) for way in ("up", "down")
    )


def kernels() -> Iterator[str]:
    """Yield the time of a rebuild by the model's size, as benchmarks/sizes.py measured it."""
    yield from ["### The model's size", ""]
    result = load(BENCHMARKS / "sizes.json")
    yield f"A pass over float32 weights with {result['threads']} threads, and as a multiple of"
    yield "reading and writing them all ([sizes](../benchmarks/results/sizes.json)). A rebuild is"
    yield "of any history."
    yield ""
    yield "| d | rebuild, K = 4,096 | K = 65,536 | project a gradient, K = 4,096 | K = 65,536 |"
    yield "|---|---|---|---|---|"
    for size in result["sizes"]:
        cells = (
            f"{size['ms'][row]:,.1f} ms ({size['vs_limit'][row]:.2f})"
            for row in ("rebuild_k4096", "rebuild_k65536", "project_k4096", "project_k65536")
        )
        yield f"| {size['weights']:,} | " + " | ".join(cells) + " |"
    yield ""
    yield "GPU: no results file here has figures of one."


HOP_S: Final = 0.05
MILLION: Final = 10**6
TIMED: Final = 1000
COORDINATOR: Final = "coordinator.json"
COST: Final = "coordinator_us_a_worker_round"
EIGHT_SCALARS: Final = {
    "name": "zeroth order, 8 scalars, int8",
    "kind": "spsa",
    "directions": 8,
    "codec": "int8",
}
"""The run of benchmarks/coordinator.py."""


def million(measured: dict[str, Any], benchmark: dict[str, Any]) -> Iterator[str]:
    """Yield the model of a million workers, by the coordinator's time for one of 1,000."""
    yield from ["### A million workers, on paper", ""]
    described = (tree.__doc__ or "").split("\n\n", 1)[1].strip()
    yield from described.splitlines()
    yield ""
    many = [row for row in measured.get("rows", ()) if row["workers"] == TIMED]
    if not many and benchmark:
        many = [EIGHT_SCALARS | {COST: benchmark[COST]}]
    if not many:
        yield "Not calculated: the coordinator's time for a child was not measured yet."
        return
    source = link("scale") if measured else f"[coordinator](../benchmarks/results/{COORDINATOR})"
    yield f"With the coordinator's processor time for one of {TIMED:,} workers ({source}) for a"
    yield f"child, and `hop_s` = {HOP_S}; the rows with a million children are of a coordinator"
    yield "alone, whose commits name every worker to every worker:"
    yield ""
    columns = "run, µs a child, children, levels, relays, s a round, worker, relay MB, root MB"
    yield "| " + " | ".join(columns.split(", ")) + " |"
    yield "|---" * 9 + "|"
    for row in many:
        for fan_out in (MILLION, 1000, 100):
            found = tree.tree(run_of(row), MILLION, fan_out, us_a_child=row[COST], hop_s=HOP_S)
            relay = f"{found.relay_bytes / 1e6:,.2f}" if found.relays else ""
            yield (
                f"| {row['name']} | {row[COST]:,.0f} | {fan_out:,} | {found.levels} | "
                f"{found.relays:,} | {found.seconds:,.2f} | {found.worker_bytes:,} bytes | "
                f"{relay} | {found.root_bytes / 1e6:,.1f} |"
            )
    if measured and benchmark:
        yield ""
        yield f"The coordinator's benchmark found {benchmark[COST]:,.0f} µs for the first kind"
        yield f"of run ([coordinator](../benchmarks/results/{COORDINATOR}))."


def run_of(row: dict[str, Any]) -> RunConfig:
    """Return the run that a row of scale.json measured."""
    return RunConfig.model_validate(
        {
            "run": {"name": "many", "rounds": 1},
            "model": {"name": "none"},
            "task": {"labels": ("a", "b")},
            "directions": {"pool_size": 4096},
            "estimator": {"kind": row["kind"]}
            | ({"directions_per_round": row["directions"]} if row["kind"] == "spsa" else {}),
            "codec": {"up": row["codec"], "down": row["codec"]},
            "optimizer": {"learning_rate": 0.001},
            "rounds": {"quorum": 1, "telemetry": "none"},
        }
    )
