"""Settings that are valid each by itself and cannot go together (`lorand.consistency`)."""

import pytest
from tests.run_text import assert_refused


@pytest.mark.parametrize(
    ("sections", "field", "remedy"),
    [
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
        "trimmed mean of own directions",
        "clipped mean by examples",
        "median of two",
        "an auditor of nothing",
        "fewer participants than the quorum",
    ],
)
def test_settings_that_do_not_go_together(
    sections: dict[str, str], field: str, remedy: str
) -> None:
    assert_refused(sections, field, remedy)
