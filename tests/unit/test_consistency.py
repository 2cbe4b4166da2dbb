"""Settings that are valid each by itself and cannot go together (`lorand.consistency`)."""

from typing import Final

import pytest
from tests.run_text import config_of

from lorand.errors import ConfigError

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
            {"estimator": "batch_size = 16\nmax_batch_size = 8"},
            "estimator.max_batch_size is below batch_size",
            "or set it to 0",
        ),
        (
            {"estimator": "max_batch_size = 64", "directions": 'mode = "own"'},
            "estimator.max_batch_size and max_directions_per_round follow",
            'needs directions.mode = "shared"',
        ),
        (
            {"estimator": 'kind = "backprop"', "directions": 'mode = "own"'},
            'estimator "backprop"',
            'set directions.mode = "shared"',
        ),
        (
            {"directions": 'family = "independent"\npool_size = 8192'},
            "directions.family",
            'use "hadamard" above 4096',
        ),
        (
            {"codec": 'up = "sign"\nrounding = "unbiased"'},
            "codec.up",
            'set codec.rounding = "nearest"',
        ),
        (
            {"run": "rounds = 5", "optimizer": "warmup_rounds = 5"},
            "optimizer.warmup_rounds = 5",
            "make it smaller",
        ),
        (
            {"rounds": 'aggregation = "majority"', "directions": 'mode = "own"'},
            "rounds.aggregation",
            'directions.mode = "shared"',
        ),
        (
            {"local": "steps = 600"},
            "estimator.directions_per_round (times local.steps)",
            "larger than directions.pool_size",
        ),
        (
            {"estimator": 'kind = "backprop"', "directions": 'drawing = "weighted"'},
            'estimator "backprop" reports the whole pool',
            'set directions.drawing = "uniform"',
        ),
        (
            {"directions": "rotate_every = 2", "model": 'dtype = "bfloat16"'},
            "directions.rotate_every",
            'set model.dtype = "float32"',
        ),
        (
            {"directions": "rotate_every = 2", "model": 'quantisation = "int8"'},
            "directions.rotate_every",
            'model.quantisation = "none"',
        ),
        (
            {"directions": 'rotate_every = 2\ndrawing = "weighted-unbiased"'},
            "weights of directions are learned on one pool",
            "set directions.rotate_every = 0",
        ),
        (
            {"estimator": 'kind = "backprop"', "local": "steps = 1\nepochs = 1"},
            "local.steps and local.epochs",
            "set one of them to 0",
        ),
        (
            {"local": "epochs = 1"},
            "local.epochs",
            'set local.steps, or estimator.kind = "backprop"',
        ),
        (
            {"local": 'steps = 1\nspace = "weights"'},
            'local.space = "weights"',
            'set estimator.kind = "backprop" and local.steps',
        ),
        (
            {"estimator": 'kind = "backprop"', "local": 'space = "weights"'},
            'local.space = "weights"',
            'set estimator.kind = "backprop" and local.steps',
        ),
        (
            {"local": "steps = 1", "codec": 'up = "log8"'},
            "a scale of its own",
            'set codec.up = "int8", "sign" or "int32"',
        ),
        (
            {"local": "steps = 1", "rounds": 'aggregation = "majority"'},
            'rounds.aggregation = "majority" votes on scalars',
            'rounds.aggregation = "mean"',
        ),
        (
            {"subspace": 'kind = "svd"'},
            'subspace.kind = "svd"',
            'set local.space = "weights"',
        ),
        (
            {"subspace": 'selection = "voted"', "estimator": 'kind = "backprop"'},
            'subspace.selection = "voted" elects columns',
            'set subspace.kind = "coordinate" or "dct"',
        ),
        (
            {"subspace": 'kind = "coordinate"\nselection = "voted"'},
            'subspace.selection = "voted" needs gradients',
            'estimator.kind = "backprop"',
        ),
        (
            {
                "subspace": 'kind = "coordinate"\nselection = "voted"',
                "estimator": 'kind = "backprop"',
                "model": 'dtype = "bfloat16"',
            },
            "elected subspaces fold each pool",
            'set model.dtype = "float32"',
        ),
        (
            {"subspace": 'kind = "dct"\nrefresh_every = 6', "directions": "rotate_every = 4"},
            "subspace.refresh_every = 6",
            "directions.rotate_every = 4",
        ),
        (
            {"subspace": 'kind = "dct"\nrefresh_every = 6'},
            "subspace.refresh_every = 6",
            "set both alike",
        ),
        (
            {"subspace": 'kind = "dct"\nlazy = true'},
            "subspace.lazy",
            "lazy = false",
        ),
        (
            {"subspace": 'kind = "dct"\nswitch_off = true'},
            "subspace.switch_off",
            "set subspace.probe = true",
        ),
        (
            {"subspace": 'kind = "dct"\nprobe = true'},
            "subspace.probe",
            "directions.rotate_every",
        ),
        (
            {"subspace": 'kind = "dct"\nstate = "adam"'},
            'subspace.state = "adam" steps when a pool is closed',
            "set directions.rotate_every = 1",
        ),
        (
            {"subspace": 'state = "adam"', "directions": "rotate_every = 1"},
            'subspace.state = "adam" is kept in subspaces that are drawn',
            'set subspace.kind = "coordinate" or "dct"',
        ),
        (
            {"subspace": 'kind = "dct"\nstate = "fira"', "directions": "rotate_every = 1"},
            'subspace.state = "fira"',
            'set subspace.kind = "coordinate"',
        ),
        (
            {
                "subspace": 'kind = "dct"\nstate = "adam"',
                "directions": "rotate_every = 1",
                "optimizer": "momentum = 0.5",
            },
            'subspace.state = "adam" takes the coordinator',
            "momentum = 0",
        ),
        (
            {
                "subspace": 'kind = "dct"\nstate = "adam"',
                "directions": "rotate_every = 1",
                "local": "steps = 2",
            },
            'subspace.state = "adam" steps along gradients',
            "set local.steps = 0",
        ),
        (
            {
                "subspace": 'kind = "dct"\nweights = "int8"\nrefresh_every = 8',
                "directions": "rotate_every = 4",
            },
            'subspace.weights = "int8"',
            'weights = "float"',
        ),
        (
            {
                "subspace": 'kind = "coordinate"\nprobe = true',
                "directions": "rotate_every = 4",
                "estimator": 'kind = "one-sided"',
            },
            "subspace.probe compares curvatures",
            'estimator.kind = "spsa"',
        ),
        (
            {
                "subspace": 'kind = "coordinate"\nprobe = true',
                "directions": "rotate_every = 4",
                "rounds": 'telemetry = "none"',
            },
            "subspace.probe needs the curvature",
            'rounds.telemetry = "loss"',
        ),
        (
            {
                "subspace": 'kind = "coordinate"\nprobe = true',
                "directions": 'rotate_every = 4\nmode = "own"',
            },
            "subspace.probe takes the noise",
            'directions.mode = "shared"',
        ),
        (
            {
                "subspace": 'kind = "coordinate"\nprobe = true',
                "directions": "rotate_every = 4",
                "rounds": "quorum = 1",
            },
            "subspace.probe takes the noise",
            "rounds.quorum of 2 or more",
        ),
        (
            {
                "subspace": 'kind = "coordinate"\nprobe = true',
                "directions": "rotate_every = 4",
                "codec": 'up = "sign"',
            },
            "subspace.probe takes the noise",
            'a codec other than "sign"',
        ),
        (
            {"subspace": 'kind = "coordinate"\nprobe = true', "directions": "rotate_every = 3"},
            "subspace.probe takes errors",
            "set subspace.refresh_every",
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
            {"rounds": 'aggregation = "trimmed-mean"', "directions": 'mode = "own"'},
            "compares scalars along the same directions",
            'rounds.aggregation = "clipped-mean"',
        ),
        (
            {"rounds": 'aggregation = "clipped-mean"\nweighting = "examples"'},
            "nobody can check",
            'rounds.weighting = "equal"',
        ),
        (
            {"rounds": 'aggregation = "median"\nquorum = 2'},
            "goes by what most participants say",
            "set rounds.quorum to 3",
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
            {"service": 'auditor = "us"'},
            "service.auditor",
            "set service.quarantine = true",
        ),
        (
            {"rounds": "participants = 2"},
            "rounds.participants must be 0",
            "at least rounds.quorum",
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
        "small growth",
        "growth of own",
        "backprop with own directions",
        "a large independent pool",
        "unbiased signs",
        "nothing but warm-up",
        "a majority on directions of one's own",
        "more steps than directions",
        "backprop with weighted directions",
        "rotation in bfloat16",
        "rotation of a quantised base",
        "rotation of weighted directions",
        "steps and epochs",
        "epochs without gradients",
        "weights without gradients",
        "weights without steps",
        "local steps in log8",
        "a majority of local steps",
        "an SVD for all",
        "votes on nothing",
        "votes without gradients",
        "elected subspaces in bfloat16",
        "a refresh between two pools",
        "a refresh without another pool",
        "lazy draws",
        "switched off unprobed",
        "a probe in one pool",
        "a state in one pool",
        "a state in full space",
        "what is outside of cosines",
        "a state on momentum",
        "a state of local steps",
        "int8 folded too often",
        "a probe without both losses",
        "a probe without telemetry",
        "a probe of own directions",
        "a probe of one participant",
        "a probe of signs",
        "a probe of three rounds",
        "median of a sum",
        "trimmed mean of own directions",
        "clipped mean by examples",
        "median of two",
        "a secure sum in haste",
        "quarantine in a sum",
        "an auditor of nothing",
        "fewer participants than the quorum",
    ],
)
def test_settings_that_do_not_go_together(
    sections: dict[str, str], field: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**sections)
    assert field in str(caught.value)
    assert remedy in str(caught.value)
    assert len(str(caught.value).split("\n")) == 2, "one reason"
