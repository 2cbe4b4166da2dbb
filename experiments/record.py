"""Results of experiments: one row a setting, in experiments/results/NAME.json and NAME.md.

A row is written as soon as one of its seeds ends, and a seed that is already there is not run
again: an interrupted experiment goes on where it stopped.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import torch

from experiments import federation
from experiments.federation import Point, payload
from experiments.provenance import provenance
from lorand.config import RunConfig
from lorand.manifest import Identity
from lorand_worker.data import Examples
from lorand_worker.tasks import Forward

RESULTS = Path(__file__).resolve().parent / "results"
TEST = "test"
HELD_OUT = "held out of the training data"

Data = Callable[[int], tuple[Sequence[Examples], Examples]]
"""The workers' shards and the scored examples of a seed."""


@dataclass(frozen=True)
class Experiment:
    """Name of the results files, what is claimed, and how the settings were found.

    `summary` adds lines of Markdown of its own to the tables.
    """

    name: str
    claim: str
    tuning: str
    summary: Callable[[dict[str, Any]], list[str]] = lambda content: []

    def measure(
        self,
        row: str,
        config: RunConfig,
        data: Data,
        *,
        scored_on: str,
        seeds: Iterable[int],
        evaluate_at: Sequence[int],
        target: float | None = None,
        theirs: Identity | None = None,
        source: Path | None = None,
        forward: Forward | None = None,
        quick: bool = False,
    ) -> None:
        """Run the seeds that the results do not hold yet; write after each.

        `source` is the model's folder, by default MiniLM's; `quick`: by `experiments.quick`.
        """
        torch.set_num_threads(1)
        numba.set_num_threads(1)
        for seed in seeds:
            content = self._read()
            entry = self._entry(content, row, config, scored_on, target)
            if str(seed) in entry["seeds"]:
                continue
            print(f"{row}, seed {seed}", flush=True)
            shards, scored = data(seed)
            started, started_cpu = time.monotonic(), time.process_time()
            points = federation.run(
                config,
                shards,
                scored,
                seed=seed,
                evaluate_at=evaluate_at,
                source=source,
                report=_show,
                forward=forward,
                theirs=theirs,
                quick=quick,
            )
            entry |= {"row": row, "workers": len(shards), **payload(config, len(shards))}
            entry["provenance"] = provenance()
            entry["seeds"][str(seed)] = {
                "accuracy": {str(p.committed): round(p.score.accuracy, 5) for p in points},
                "loss": {str(p.committed): round(p.score.loss, 5) for p in points},
                "scored_examples": len(scored),
                "smallest_and_largest_shard": [min(map(len, shards)), max(map(len, shards))],
                "wall_s": round(time.monotonic() - started),
                "cpu_s": round(time.process_time() - started_cpu),
            }
            entry["mean_accuracy"] = _means(entry["seeds"].values())
            self._write(content)

    def _entry(
        self, content: dict[str, Any], row: str, config: RunConfig, scored_on: str, target: Any
    ) -> dict[str, Any]:
        key = {"config_digest": config.digest().hex(), "scored_on": scored_on}
        for entry in content["rows"]:
            if key.items() <= entry.items():
                return entry  # type: ignore[no-any-return]
        settings = config.model_dump(mode="json", exclude={"service", "task"})
        entry = {"row": row, **key, "target": target, "settings": settings, "seeds": {}}
        content["rows"].append(entry)
        return entry

    def _read(self) -> dict[str, Any]:
        path = RESULTS / f"{self.name}.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
        head = {"experiment": self.name, "claim": self.claim, "tuning": self.tuning}
        return {**head, "rows": content["rows"]}

    def _write(self, content: dict[str, Any]) -> None:
        RESULTS.mkdir(exist_ok=True)
        for suffix, text in (
            ("json", json.dumps(content, indent=1)),
            ("md", table(content, self.summary(content))),
        ):
            path = RESULTS / f"{self.name}.{suffix}"
            partial = path.with_suffix(".partial")
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(path)


def table(content: dict[str, Any], summary: Sequence[str] = ()) -> str:
    """Return the results as Markdown, an experiment's own summary before the rows."""
    made = content["rows"][-1]["provenance"]
    lines = [
        f"# {content['experiment']}",
        "",
        content["claim"],
        "",
        content["tuning"],
        "",
        *summary,
    ]
    for scored_on in (TEST, HELD_OUT):
        rows = [row for row in content["rows"] if row["scored_on"] == scored_on and row["seeds"]]
        if not rows:
            continue
        lines += [f"Accuracy, {scored_on}:", ""]
        lines += ["| row | seeds | mean after round | last, by seed | target | up + down, bytes |"]
        lines += ["|---|---|---|---|---|---|"] + [_line(row) for row in rows] + [""]
    versions = ", ".join(f"{key} {value}" for key, value in made.items() if key != "cpu")
    return "\n".join([*lines, f"One thread of {made['cpu']}; {versions}."])


def _line(row: dict[str, Any]) -> str:
    means = row["mean_accuracy"]
    last = list(means)[-1]
    each = ", ".join(f"{seed['accuracy'][last]:.3f}" for seed in row["seeds"].values())
    target = row["target"]
    verdict = "" if target is None else f"{target} {'met' if means[last] >= target else 'missed'}"
    curve = ", ".join(f"{at}: {value:.3f}" for at, value in means.items() if at != "0")
    size = f"{row['bytes_up_a_worker_round']:,} + {row['bytes_down_a_worker_round']:,}"
    return f"| {row['row']} | {len(row['seeds'])} | {curve} | {each} | {verdict} | {size} |"


def _means(seeds: Iterable[dict[str, Any]]) -> dict[str, float]:
    curves = [seed["accuracy"] for seed in seeds]
    return {at: round(sum(c[at] for c in curves) / len(curves), 5) for at in curves[0]}


def _show(point: Point) -> None:
    print(f"  round {point.committed}: accuracy {point.score.accuracy:.4f}", flush=True)
