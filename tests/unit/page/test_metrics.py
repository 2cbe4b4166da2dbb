"""What Prometheus reads, and that the dashboard asks for nothing else."""

import json
import re
from pathlib import Path
from typing import Final

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.runs import evaluation_of
from tests.unit.page.conftest import MakeStage
from tests.unit.page.staging import Stage

from lorand_coordinator.page.metrics import Metrics
from lorand_coordinator.page.view import Spent

DASHBOARD: Final = Path(__file__).resolve().parents[3] / "deploy" / "grafana" / "lorand.json"


def values(metrics: Metrics) -> dict[str, float]:
    """Every sample by its name, with labels where it has some."""
    found = {}
    for family in text_string_to_metric_families(metrics.text()[0].decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def metrics_of(stage: Stage | None, spent: Spent | None = None) -> Metrics:
    return Metrics("small", lambda: (None if stage is None else stage.hub, spent))


def test_what_a_run_counts(stage: Stage) -> None:
    metrics = metrics_of(stage)
    stage.commit(rounds=2)
    metrics.committed(0.004, 1.5)
    stage.answer(stage.hub.connections[1])
    stage.answer(stage.hub.connections[1], loss=0.25)
    stage.hub.sequencer.tally.evaluations.append(evaluation_of("eve", 2, 0.75))
    found = values(metrics)
    assert found["lorand_run_info{name=small}"] == 1
    assert found["lorand_leading"] == 1
    assert found["lorand_rounds_committed_total"] == 2
    assert found["lorand_contributions_total"] == 4
    assert found["lorand_codes_bytes_total"] == 24
    assert found["lorand_received_bytes_total"] > 0
    assert found["lorand_workers_connected"] == 2
    assert found["lorand_ledger_entries"] == len(stage.store)
    assert found["lorand_round_deadline_seconds"] == 10.0
    assert found["lorand_rejected_total{reason=untimely}"] == 1
    assert found["lorand_rejected_total{reason=malformed}"] == 0
    assert found["lorand_loss"] == 0.5
    assert found["lorand_accuracy{evaluator=eve}"] == 0.75
    assert found["lorand_commit_duration_seconds_bucket{le=0.005}"] == 1
    assert found["lorand_commit_duration_seconds_bucket{le=0.0025}"] == 0
    assert found["lorand_round_duration_seconds_sum"] == 1.5
    assert found["lorand_ledger_failing"] == 0


def test_a_name_that_has_quotes(stage: Stage) -> None:
    """Names are the evaluators' own; labels take any."""
    name = 'eve"} evil 1\n'
    stage.hub.sequencer.tally.evaluations.append(evaluation_of(name, 0, 0.5))
    assert values(metrics_of(stage))[f"lorand_accuracy{{evaluator={name}}}"] == 0.5


def test_a_full_disk_shows(stage: Stage) -> None:
    stage.store.full = True
    stage.commit()
    assert values(metrics_of(stage))["lorand_ledger_failing"] == 1


def test_who_stands_by_has_few() -> None:
    found = values(metrics_of(None))
    assert found["lorand_leading"] == 0
    assert "lorand_rounds_committed_total" not in found


@pytest.mark.parametrize("spent", [None, Spent(7, 1.5)])
def test_a_private_run_shows_its_budget(stage: Stage, spent: Spent | None) -> None:
    section = stage.config.privacy.model_copy(update={"mode": "worker", "target_epsilon": 4.0})
    stage.hub.config = stage.config.model_copy(update={"privacy": section})
    found = values(metrics_of(stage, spent))
    assert found["lorand_privacy_epsilon_target"] == 4.0
    assert found.get("lorand_privacy_epsilon_spent") == (1.5 if spent else None)


def test_every_name_of_the_dashboard_is_there(make_stage: MakeStage) -> None:
    stage = make_stage(run={"rounds": 20})
    stage.join("ada")
    stage.join("ben")
    stage.commit(rounds=2)
    stage.hub.sequencer.tally.evaluations.append(evaluation_of("eve", 2, 0.75))
    section = stage.config.privacy.model_copy(update={"mode": "worker"})
    stage.hub.config = stage.config.model_copy(update={"privacy": section})
    there = {name.partition("{")[0] for name in values(metrics_of(stage, Spent(2, 0.5)))}
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [variable["query"]["query"] for variable in board["templating"]["list"][1:]]
    names = {name for text in asked for name in re.findall(r"lorand_\w+", text)}
    assert len(names) > 20
    assert names <= there, names - there
