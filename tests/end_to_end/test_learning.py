"""Learning on real data: the committed figures of experiments/results hold here too."""

import pytest
from experiments import federation, uci_sentiment

pytestmark = [
    pytest.mark.data,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not (federation.DATA / "uci_sentiment").is_dir(),
        reason=f"the UCI sentences are not in {federation.DATA}; set LORAND_DATA",
    ),
]


@pytest.mark.parametrize(
    ("kind", "rounds", "least"),
    [("backprop", 10, 0.85), ("spsa", 20, 0.60)],
)
def test_three_domains_learn_together(kind: str, rounds: int, least: float) -> None:
    """First order reaches its target in ten rounds; zeroth order is well on its way in twenty."""
    options = uci_sentiment.parse([])
    shards, test = uci_sentiment.shards_and_test(held_out=False)
    config = uci_sentiment.settings(kind, options)
    if kind == "spsa":  # the schedule of a short run, not the first steps of a long one
        run = config.run.model_copy(update={"rounds": rounds})
        config = config.model_copy(update={"run": run})
    points = federation.run(config, shards, test, seed=0, evaluate_at=[0, rounds])
    assert points[0].score.accuracy < 0.6
    assert points[-1].score.accuracy >= least
