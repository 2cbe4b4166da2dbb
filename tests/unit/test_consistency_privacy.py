"""Settings of [privacy] that cannot go together, or with others (`lorand.consistency`)."""

from typing import Final

import pytest
from tests.run_text import assert_refused

PRIVATE: Final = 'mode = "worker"'
SECURE: Final = 'mode = "secure-sum"\nhonest_min = 2'


@pytest.mark.parametrize(
    ("sections", "field", "remedy"),
    [
        (
            {"privacy": PRIVATE},
            "a batch's loss would leave",
            'rounds.telemetry = "none"',
        ),
        (
            {"privacy": PRIVATE, "rounds": 'telemetry = "none"\nweighting = "examples"'},
            "the number of examples would leave",
            'rounds.weighting = "equal"',
        ),
        (
            {"privacy": PRIVATE, "rounds": 'telemetry = "none"', "local": "steps = 2"},
            "not local steps",
            "local.steps = 0",
        ),
        (
            {
                "privacy": PRIVATE,
                "rounds": 'telemetry = "none"',
                "estimator": 'kind = "backprop"',
                "subspace": 'kind = "dct"\nselection = "voted"',
            },
            "votes would leave",
            'subspace.selection = "drawn"',
        ),
        (
            {
                "privacy": PRIVATE,
                "rounds": 'telemetry = "none"',
                "estimator": "max_batch_size = 64",
            },
            "sampled at one rate",
            "estimator.max_batch_size = 0",
        ),
        (
            {
                "privacy": PRIVATE,
                "rounds": 'telemetry = "none"',
                "estimator": "max_directions_per_round = 64",
            },
            "sampled at one rate",
            "max_directions_per_round = 0",
        ),
        (
            {
                "privacy": PRIVATE,
                "rounds": 'telemetry = "none"',
                "directions": 'scale_rule = "calibrated"',
            },
            "direction scales",
            'directions.scale_rule = "head"',
        ),
        (
            {"privacy": PRIVATE + '\nmechanism = "laplace"', "rounds": 'telemetry = "none"'},
            "delta 0",
            "set privacy.delta = 0",
        ),
        (
            {"privacy": PRIVATE + "\ndelta = 0", "rounds": 'telemetry = "none"'},
            "delta 0",
            "or 1e-5",
        ),
        (
            {"privacy": PRIVATE + "\nbatch_cap = 40", "rounds": 'telemetry = "none"'},
            "privacy.batch_cap costs epsilon",
            "set privacy.max_examples",
        ),
        (
            {"privacy": PRIVATE + "\nmax_examples = 40", "rounds": 'telemetry = "none"'},
            "privacy.batch_cap costs epsilon",
            "or both to 0",
        ),
        (
            {
                "privacy": PRIVATE
                + '\nmechanism = "laplace"\ndelta = 0\nbatch_cap = 40\nmax_examples = 400',
                "rounds": 'telemetry = "none"',
            },
            'known for mechanism = "gaussian" alone',
            "privacy.batch_cap = 0",
        ),
        (
            {
                "privacy": 'mode = "central"',
                "rounds": 'telemetry = "none"',
                "directions": 'mode = "own"',
            },
            'privacy.mode = "central" sums what all measured along the same directions',
            'set directions.mode = "shared"',
        ),
        (
            {
                "privacy": 'mode = "central"',
                "rounds": 'telemetry = "none"\naggregation = "majority"',
            },
            "knows nobody's sign",
            'set rounds.aggregation = "mean"',
        ),
        (
            {
                "privacy": SECURE + '\nmechanism = "laplace"\ndelta = 0',
                "rounds": 'telemetry = "none"',
            },
            "shares of Laplace noise",
            'privacy.mechanism = "gaussian"',
        ),
        (
            {"privacy": SECURE, "rounds": 'telemetry = "none"\nquorum = 2'},
            "a secure sum has 3 to 32 members",
            "set rounds.quorum",
        ),
        (
            {"privacy": SECURE, "rounds": 'telemetry = "none"\nquorum = 33'},
            "a secure sum has 3 to 32 members",
            "set rounds.quorum",
        ),
        (
            {"privacy": SECURE + "\nhonest_min = 4", "rounds": 'telemetry = "none"'},
            "privacy.honest_min is how many members' noise has to suffice",
            "set it to 1 to 3",
        ),
        (
            {"privacy": 'mode = "secure-sum"', "rounds": 'telemetry = "none"'},
            "privacy.honest_min",
            "set it to 1 to 3",
        ),
        (
            {"privacy": PRIVATE + "\nhonest_min = 2", "rounds": 'telemetry = "none"'},
            "privacy.honest_min is for shares of noise",
            'set privacy.mode = "secure-sum"',
        ),
        (
            {
                "privacy": 'mode = "central"',
                "rounds": 'telemetry = "none"\naggregation = "median"',
            },
            "knows nobody's sign or scalars",
            'rounds.aggregation = "mean"',
        ),
        (
            {"privacy": SECURE, "rounds": 'telemetry = "none"\ndeadline_k = 3.0'},
            "nothing without the slowest member",
            "rounds.deadline_k = 0",
        ),
        (
            {
                "privacy": 'mode = "central"',
                "rounds": 'telemetry = "none"',
                "service": "quarantine = true",
            },
            "keeps nobody's scalars",
            "set it to false",
        ),
        (
            {
                "privacy": 'mode = "central"',
                "rounds": 'telemetry = "none"',
                "service": "statements_every = 50",
            },
            "stores nobody's contribution",
            "set it to 0",
        ),
        (
            {
                "privacy": SECURE,
                "rounds": 'telemetry = "none"',
                "service": "statements_every = 50",
            },
            "stores nobody's contribution",
            "set it to 0",
        ),
    ],
    ids=[
        "privacy and loss",
        "privacy and examples",
        "privacy and local steps",
        "privacy and votes",
        "privacy and growing batches",
        "privacy and growing draws",
        "privacy and calibrated scales",
        "laplace and delta",
        "gaussian without delta",
        "cap without examples",
        "examples without cap",
        "cap of laplace",
        "central and own directions",
        "central and majority",
        "shares of laplace",
        "sum of two",
        "sum of too many",
        "more honest than there are",
        "nobody honest",
        "honest where nothing is shared",
        "median of a sum",
        "a secure sum in haste",
        "quarantine in a sum",
        "statements of a central sum",
        "statements of a secure sum",
    ],
)
def test_settings_that_do_not_go_with_privacy(
    sections: dict[str, str], field: str, remedy: str
) -> None:
    assert_refused(sections, field, remedy)
