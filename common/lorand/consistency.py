"""Which settings of a run cannot go together, with the way out."""

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from lorand.privacy.roster import MAX_MEMBERS, MIN_MEMBERS

if TYPE_CHECKING:
    from lorand.config import RunConfig

Refusals = Iterator[tuple[bool, str]]
"""Whether something is wrong, and the sentence that says so."""


def refusals(config: "RunConfig") -> Refusals:
    """Yield every check of a run file whose sections are valid each by itself."""
    return chain(
        _model(config),
        _measured(config),
        _moved_on(config),
        _grown(config),
        _taken(config),
        _subspace(config),
        _state(config),
        _private(config),
        _summed(config),
        _aggregated(config),
        _differences(config),
        _run(config),
    )


def _model(config: "RunConfig") -> Refusals:
    """Model and task."""
    model, task = config.model, config.task
    yield (
        model.adapter == "randlora" and config.estimator.kind == "forward",
        'model.adapter = "randlora" has no forward-mode derivative: set '
        'estimator.kind = "spsa" or "backprop", or model.adapter = "lora"',
    )
    yield (
        task.kind != "classification" and model.head != "auto",
        f'model.head = "{model.head}" is a new head, which task.kind = "{task.kind}" does '
        'without: set model.head = "auto"',
    )


def _measured(config: "RunConfig") -> Refusals:
    """Directions, estimator and codec."""
    estimator, directions = config.estimator, config.directions
    perturbs = estimator.kind in ("spsa", "one-sided")
    yield (
        config.perturbation_quanta < 1 and perturbs,
        "estimator.perturbation_scale is below the quantum 2^-quantum_exponent; raise one of them",
    )
    yield (
        config.num_directions > directions.pool_size,
        "estimator.directions_per_round (times local.steps) is larger than directions.pool_size",
    )
    yield (
        estimator.kind == "backprop" and directions.mode == "own",
        'estimator "backprop" reports the whole pool: set directions.mode = "shared"',
    )
    yield (
        estimator.kind == "backprop" and directions.drawing != "uniform",
        'estimator "backprop" reports the whole pool: set directions.drawing = "uniform"',
    )
    yield from _mixed(config)
    yield (
        directions.family == "independent" and directions.pool_size > 4096,
        'directions.family = "independent" costs K passes; use "hadamard" above 4096',
    )
    yield (
        config.codec.rounding == "unbiased" and config.codec.up == "sign",
        'codec.up = "sign" keeps only signs, which cannot be unbiased: set '
        'codec.rounding = "nearest", or codec.up = "int8" or "log8"',
    )


def _mixed(config: "RunConfig") -> Refusals:
    """Workers that measure the same scalars in their own way."""
    mixed = config.estimator.mixed
    yield (
        mixed and config.estimator.kind != "spsa",
        "estimator.mixed lets workers measure the slopes that two losses tell by a backward pass: "
        'set estimator.kind = "spsa", or mixed = false',
    )
    yield (
        mixed and config.subspace.probe,
        "subspace.probe compares curvatures, which a backward pass does not tell: set "
        "estimator.mixed = false, or subspace.probe = false",
    )
    yield (
        mixed and config.privacy.noised,
        "the noise of a private run is calculated for one estimator: with [privacy] set "
        "estimator.mixed = false",
    )


def _moved_on(config: "RunConfig") -> Refusals:
    """Runs that leave a pool for another one."""
    several = config.directions.rotate_every > 0 or config.subspace.selection == "voted"
    yield (
        several and (config.model.dtype != "float32" or config.model.quantisation != "none"),
        "directions.rotate_every and elected subspaces fold each pool into float32 weights: set "
        'model.dtype = "float32" and model.quantisation = "none" (workers still pass in bfloat16 '
        "with --precision)",
    )
    yield (
        several and config.directions.drawing != "uniform",
        "weights of directions are learned on one pool: set directions.rotate_every = 0 and no "
        'subspace.selection = "voted", or directions.drawing = "uniform"',
    )


def _grown(config: "RunConfig") -> Refusals:
    """Batches and of numbers of directions that grow."""
    estimator = config.estimator
    yield (
        0 < estimator.max_batch_size < estimator.batch_size,
        "estimator.max_batch_size is below batch_size: raise it, or set it to 0 for batches "
        "that stay as they are",
    )
    most = estimator.max_directions_per_round
    yield (
        0 < most < estimator.directions_per_round or most > config.directions.pool_size,
        "estimator.max_directions_per_round must be directions_per_round to "
        "directions.pool_size, or 0 for as many in each round",
    )
    yield (
        most > 0 and estimator.kind == "backprop",
        'estimator "backprop" measures all directions: set max_directions_per_round = 0',
    )
    yield (
        (most > 0 or estimator.max_batch_size > 0)
        and (
            config.directions.mode == "own"
            or config.local.taken
            or config.codec.up == "sign"
            or config.rounds.quorum < 2
        ),
        "estimator.max_batch_size and max_directions_per_round follow from how far "
        'participants\' scalars are apart: that needs directions.mode = "shared", local.steps '
        '= 0, rounds.quorum of 2 or more and a codec other than "sign"; or set both to 0',
    )


def _taken(config: "RunConfig") -> Refusals:
    """Local steps."""
    local = config.local
    backprop = config.estimator.kind == "backprop"
    yield (
        local.steps > 0 and local.epochs > 0,
        "local.steps and local.epochs say the same in two ways: set one of them to 0",
    )
    yield (
        local.epochs > 0 and not backprop,
        "local.epochs is another number of steps for each participant, which directions "
        'cannot be drawn for: set local.steps, or estimator.kind = "backprop"',
    )
    yield (
        local.space == "weights" and not (backprop and local.taken),
        'local.space = "weights" needs gradients and steps: set estimator.kind = "backprop" '
        "and local.steps",
    )
    yield (
        local.taken and config.codec.up == "log8",
        'what local steps moved is reported with a scale of its own: set codec.up = "int8", '
        '"sign" or "int32"',
    )
    yield (
        local.taken and config.rounds.aggregation == "majority",
        'rounds.aggregation = "majority" votes on scalars: set local.steps = 0, or '
        'rounds.aggregation = "mean"',
    )


def _subspace(config: "RunConfig") -> Refusals:
    """Subspaces, and when they are chosen anew."""
    section, rotate = config.subspace, config.directions.rotate_every
    yield (
        section.kind == "svd" and config.local.space != "weights",
        'subspace.kind = "svd" is a worker\'s own basis, from gradients of its local steps: set '
        'local.space = "weights" with estimator.kind = "backprop", or kind = "coordinate" or "dct"',
    )
    yield (
        section.selection == "voted" and not section.restricts,
        'subspace.selection = "voted" elects columns: set subspace.kind = "coordinate" or "dct"',
    )
    yield (
        section.selection == "voted" and config.estimator.kind != "backprop",
        'subspace.selection = "voted" needs gradients, which forward passes do not have: set '
        'selection = "drawn", or estimator.kind = "backprop"',
    )
    yield (
        section.refresh_every > 0 and (rotate == 0 or section.refresh_every % rotate != 0),
        f"subspace.refresh_every = {section.refresh_every} is not a multiple of "
        f"directions.rotate_every = {rotate}: a subspace is left with its pool; set both alike",
    )
    yield (
        section.weights != "float"
        and (
            not section.restricts
            or section.state != "none"
            or section.refresh_every not in (0, rotate)
        ),
        f'subspace.weights = "{section.weights}" rounds matrices once a subspace: set '
        'subspace.kind = "coordinate" or "dct", state = "none", and refresh_every = '
        'directions.rotate_every; or weights = "float"',
    )
    yield (
        section.lazy and section.selection != "voted",
        "subspace.lazy refreshes seldom what voters choose again: set subspace.selection = "
        '"voted", or lazy = false',
    )
    yield (
        section.probe
        and not (
            section.restricts and rotate > 0 and section.state == "none" and not config.local.taken
        ),
        "subspace.probe compares scalars of the subspace with some of full space: that needs a "
        'subspace.kind of "coordinate" or "dct", directions.rotate_every, subspace.state = "none" '
        "and no local steps; or set probe = false",
    )
    yield (
        section.switch_off and not section.probe,
        "subspace.switch_off goes by what probes tell: set subspace.probe = true as well",
    )
    yield from _probe(config)


def _probe(config: "RunConfig") -> Refusals:
    """What tells whether a subspace pays."""
    probe, rounds = config.subspace.probe, config.rounds
    yield (
        probe and config.estimator.kind != "spsa",
        "subspace.probe compares curvatures, which losses on both sides of the weights tell: set "
        'estimator.kind = "spsa", or probe = false',
    )
    yield (
        probe and rounds.telemetry == "none",
        "subspace.probe needs the curvature that participants met beside their scalars: set "
        'rounds.telemetry = "loss", or subspace.probe = false',
    )
    yield (
        probe
        and (config.directions.mode == "own" or rounds.quorum < 2 or config.codec.up == "sign"),
        "subspace.probe takes the noise of scalars out by how far participants' are apart: that "
        'needs directions.mode = "shared", rounds.quorum of 2 or more and a codec other than '
        '"sign"; or set probe = false',
    )
    yield (
        probe and max(config.subspace.refresh_every, config.directions.rotate_every) < 4,
        "subspace.probe takes errors from how far the rounds of a probe are apart, after those in "
        "which the scale of codes follows: set subspace.refresh_every (with directions."
        "rotate_every, if that is not a part of it) to 4 or more, or probe = false",
    )


def _state(config: "RunConfig") -> Refusals:
    """Optimizer state that every replica keeps."""
    section, optimizer = config.subspace, config.optimizer
    kept = section.state != "none"
    name = f'subspace.state = "{section.state}"'
    yield (
        kept and not (section.restricts and section.selection == "drawn"),
        f'{name} is kept in subspaces that are drawn: set subspace.kind = "coordinate" or "dct" '
        'and selection = "drawn"',
    )
    yield (
        section.state in ("frugal", "fira") and section.kind != "coordinate",
        f'{name} takes what is outside of the subspace as it is: set subspace.kind = "coordinate"',
    )
    yield (
        kept and config.directions.rotate_every != 1,
        f"{name} steps when a pool is closed: set directions.rotate_every = 1, and "
        "subspace.refresh_every to the rounds that a subspace lasts",
    )
    plain = optimizer.kind == "sgd" and optimizer.normalise and optimizer.momentum == 0
    yield (
        kept and not plain,
        f'{name} takes the coordinator\'s estimate as it is: set optimizer.kind = "sgd", normalise '
        "= true and momentum = 0",
    )
    yield (
        kept and config.local.taken,
        f"{name} steps along gradients, and local steps report none: set local.steps = 0, or "
        'subspace.state = "none"',
    )


def _private(config: "RunConfig") -> Refusals:
    """What would leave without noise, or be more than its noise was calculated for."""
    section, estimator = config.privacy, config.estimator
    private = section.noised
    yield (
        private and config.rounds.telemetry != "none",
        'a batch\'s loss would leave without noise: with [privacy] set rounds.telemetry = "none"',
    )
    yield (
        private and config.rounds.weighting != "equal",
        "the number of examples would leave without noise: with [privacy] set rounds.weighting = "
        '"equal"',
    )
    yield (
        private and config.local.taken,
        "noise covers the scalars of one batch, not local steps: with [privacy] set local.steps "
        "= 0 and local.epochs = 0",
    )
    yield (
        private and config.subspace.selection == "voted",
        'votes would leave without noise: with [privacy] set subspace.selection = "drawn"',
    )
    yield (
        private and (estimator.max_batch_size > 0 or estimator.max_directions_per_round > 0),
        "batches of a private run are sampled at one rate: with [privacy] set "
        "estimator.max_batch_size = 0 and max_directions_per_round = 0",
    )
    yield (
        private and config.directions.scale_rule == "calibrated",
        "direction scales that are measured on data leave without noise: with [privacy] set "
        'directions.scale_rule = "head" or "size"',
    )
    yield (
        private and (section.mechanism == "laplace") != (section.delta == 0),
        'privacy.mechanism = "laplace" has delta 0 and "gaussian" a small one above it: set '
        "privacy.delta = 0, or 1e-5",
    )
    yield (
        (section.batch_cap > 0) != (section.max_examples > 0),
        "privacy.batch_cap costs epsilon by how often a batch is cut, hence by the number of "
        "examples: set privacy.max_examples, the most that a worker may have; or both to 0",
    )
    yield (
        section.batch_cap > 0 and section.mechanism == "laplace",
        'what a privacy.batch_cap costs is known for mechanism = "gaussian" alone: set '
        "privacy.batch_cap = 0 and max_examples = 0",
    )


def _summed(config: "RunConfig") -> Refusals:
    """What cannot be done with the sum of all participants alone."""
    section, rounds = config.privacy, config.rounds
    name, secure = f'privacy.mode = "{section.mode}"', section.mode == "secure-sum"
    yield (
        section.summed and config.directions.mode == "own",
        f"{name} sums what all measured along the same directions: set directions.mode = "
        '"shared", or privacy.mode = "worker"',
    )
    yield (
        section.summed and rounds.aggregation != "mean",
        f'{name} knows nobody\'s sign or scalars: set rounds.aggregation = "mean", or '
        'privacy.mode = "worker"',
    )
    yield (
        secure and section.mechanism == "laplace",
        "shares of Laplace noise do not add up to Laplace noise: with privacy.mode = "
        '"secure-sum" set privacy.mechanism = "gaussian"',
    )
    yield (
        secure and not MIN_MEMBERS <= rounds.quorum <= MAX_MEMBERS,
        f"a secure sum has {MIN_MEMBERS} to {MAX_MEMBERS} members: set rounds.quorum to the "
        "fewest that may be summed",
    )
    yield (
        secure and not 0 < section.honest_min <= rounds.quorum,
        "privacy.honest_min is how many members' noise has to suffice, whatever the others do: "
        f"set it to 1 to {rounds.quorum} (rounds.quorum); the smaller, the more noise",
    )
    yield (
        secure and rounds.deadline_k > 0,
        "a secure sum is nothing without the slowest member: with privacy.mode = "
        '"secure-sum" set rounds.deadline_k = 0',
    )
    yield (
        not secure and section.honest_min > 0,
        'privacy.honest_min is for shares of noise: set privacy.mode = "secure-sum", or '
        "honest_min = 0",
    )


def _aggregated(config: "RunConfig") -> Refusals:
    """What becomes of the scalars, and of whose."""
    rounds = config.rounds
    rule, name = rounds.aggregation, f'rounds.aggregation = "{rounds.aggregation}"'
    own = config.directions.mode == "own"
    yield (
        rule == "majority" and own,
        f'{name} votes on directions that all measured: set directions.mode = "shared"',
    )
    yield (
        rule in ("median", "trimmed-mean") and own,
        f"{name} compares scalars along the same directions: set directions.mode = "
        '"shared", or rounds.aggregation = "clipped-mean"',
    )
    robust = rule not in ("mean", "majority")
    yield (
        robust and rounds.weighting == "examples",
        f"{name} with weights by a number of examples that nobody can check would be no bound on "
        'what a participant does: set rounds.weighting = "equal"',
    )
    yield (
        robust and rounds.quorum < 3,
        f"{name} goes by what most participants say, which needs three: set rounds.quorum to 3 or "
        'more, or rounds.aggregation = "mean"',
    )
    service, summed = config.service, config.privacy.summed
    yield (
        service.quarantine and summed,
        f'privacy.mode = "{config.privacy.mode}" keeps nobody\'s scalars, which service.quarantine '
        "goes by: set it to false",
    )
    yield (
        service.auditor != "" and (own or not service.quarantine),
        "service.auditor is whom others' scalars are compared with along the same directions: set "
        'service.quarantine = true and directions.mode = "shared", or auditor = ""',
    )
    yield (
        service.statements_every > 0 and summed,
        f'privacy.mode = "{config.privacy.mode}" stores nobody\'s contribution, which '
        "service.statements_every has workers sign for: set it to 0",
    )
    yield (
        0 < rounds.participants < rounds.quorum,
        "rounds.participants must be 0 (= all that are connected) or at least rounds.quorum",
    )


def _differences(config: "RunConfig") -> Refusals:
    """DIFF2: rounds that release what gradients changed by (experimental)."""
    section, directions, optimizer = config.privacy, config.directions, config.optimizer
    ours, name = section.differences, 'privacy.estimator = "diff2"'
    yield (
        ours and (section.mode != "worker" or section.mechanism != "gaussian"),
        f'{name} is Gaussian noise of every worker: set privacy.mode = "worker" and mechanism = '
        '"gaussian"',
    )
    yield (
        ours and section.batch_cap > 0,
        f"{name} has no cap on batches: set privacy.batch_cap = 0 and max_examples = 0",
    )
    shared = directions.mode == "shared" and directions.drawing == "uniform"
    yield (
        ours and not (shared and config.num_directions == directions.pool_size),
        f"{name} compares rounds along the same directions: set estimator.directions_per_round = "
        f'{directions.pool_size} = directions.pool_size, directions.mode = "shared" and drawing = '
        '"uniform"',
    )
    yield (
        ours and directions.rotate_every % section.restart_every != 0,
        f"{name} begins a pool with a restart: set directions.rotate_every = 0, or to a multiple "
        f"of privacy.restart_every = {section.restart_every}",
    )
    yield (
        ours and (config.subspace.kind != "full"),
        f'{name} is known for whole matrices: set subspace.kind = "full"',
    )
    plain = optimizer.kind == "sgd" and optimizer.momentum == 0 and optimizer.clip_factor == 0
    yield (
        ours and not (plain and not optimizer.normalise),
        f'{name} steps along what it has gathered: set optimizer.kind = "sgd", normalise = false, '
        "momentum = 0 and clip_factor = 0",
    )
    yield (
        ours and (config.codec.up != "int32" or config.rounds.aggregation != "mean"),
        f"{name} releases numbers of very different sizes, which are added up: set codec.up = "
        '"int32" and rounds.aggregation = "mean"',
    )
    yield ours and config.run.rounds < 2, f"{name} has nothing to compare: set run.rounds to 2"


def _run(config: "RunConfig") -> Refusals:
    """Rounds, schedule and service."""
    rounds, service = config.rounds, config.service
    yield (
        config.optimizer.warmup_rounds >= config.run.rounds,
        f"optimizer.warmup_rounds = {config.optimizer.warmup_rounds} leaves nothing of "
        f"{config.run.rounds} rounds; make it smaller",
    )
    yield (
        0 < rounds.start_with < rounds.quorum,
        "rounds.start_with must be 0 (= quorum) or at least rounds.quorum",
    )
    yield (
        service.heartbeat_timeout_s < 2 * service.heartbeat_s,
        "service.heartbeat_timeout_s must be at least twice heartbeat_s",
    )
