"""What this machine brings: its examples and its copy of the model, and whether they fit."""

from itertools import islice
from typing import Final

from lorand.errors import LorandError
from lorand.findings import Finding, failed, ok, warning
from lorand_worker import guard, sources
from lorand_worker.doctor.patient import Patient

MANY: Final = 0.1
"""Share of examples that may be cut without a word."""


def examples(patient: Patient) -> Finding | None:
    """The data can be read, with the columns, labels and number that the run needs."""
    from lorand_worker import data as data_files

    if patient.data is None:
        return None
    if patient.planned is None:
        rows = list(islice(sources.read(patient.data).rows, 1))
        if not rows:
            return failed(f"{patient.data} holds no examples; give a file with at least one")
        return warning(
            f"{patient.data} has the columns {', '.join(map(repr, rows[0][1]))}; whether they are "
            "the run's is known with its ADDRESS, or --run FILE"
        )
    found, (config, _) = patient.examples, patient.planned
    assert found is not None
    guard.check_examples(config, len(found), str(patient.data))
    missing = data_files.missing_labels(found, config.task)
    text = f"{len(found)} examples in {patient.data}"
    if missing:
        listed = ", ".join(map(repr, missing[:8]))
        return warning(f"{text}, none of them labelled {listed}: other workers may have some")
    return ok(text)


def model(patient: Patient) -> Finding | None:
    """The run's model loads, and is the same as everybody's."""
    from lorand_worker import tasks
    from lorand_worker.resolution import check_perturbation

    if patient.planned is None:
        if patient.model is None:
            return None
        return warning(
            f"{patient.model} is not loaded: what it is needed for is known with the run's "
            "ADDRESS, or --run FILE"
        )
    config, theirs = patient.planned
    base = patient.base
    assert base is not None
    if theirs is not None:
        guard.check_identity(base.identity, theirs)
    tasks.check(base.loaded, config)
    check_perturbation(config, base.replica)
    count = base.identity.manifest.num_weights
    same = "the run's own bits" if theirs is not None else "loaded"
    return ok(f"{patient.model or config.model.name}: {count:,} trained weights, {same}")


def lengths(patient: Patient) -> Finding | None:
    """The examples fit into the tokens that the run allows."""
    from lorand_worker.bench import task_for

    if patient.planned is None or patient.data is None:
        return None
    try:
        base, found = patient.base, patient.examples
    except LorandError:
        return None  # said by the checks of these
    assert base is not None
    assert found is not None
    config, _ = patient.planned
    task = task_for(base, config, found)
    share = task.at_limit(config.model.max_length)
    text = f"{share:.0%} of the examples fill model.max_length = {config.model.max_length} tokens"
    if share > MANY or task.cut:
        return warning(
            f"{text}, what is longer is cut: that is the run's choice; tell its operator if the "
            "ends of texts matter"
        )
    return ok(text)
