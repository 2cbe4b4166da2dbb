"""lr-worker: take part in a run with private data, evaluate it, and keep what it learned."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

# A worker's data and model may be offline; no library may phone home unasked.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.console import Console

from lorand import heads
from lorand.config import RunConfig, load
from lorand.durable import state_folder
from lorand.errors import ConfigError, LorandError
from lorand.manifest import Identity
from lorand_worker import connecting, guard, privacy_cli
from lorand_worker.flags import (
    Address,
    CacheDir,
    CacheDisk,
    CacheMemory,
    CoordinatorKey,
    CredentialsFile,
    Data,
    Device,
    GiveUp,
    IdentityFile,
    Insecure,
    Json,
    KeptWeights,
    MaxEpsilon,
    MinMembers,
    Model,
    PublicData,
    RequirePrivacy,
    RosterFile,
    State,
    Threads,
    TrustCoordinator,
    with_optional_value,
)
from lorand_worker.memory import Weights
from lorand_worker.precision import Precision
from lorand_worker.reporting import ConsoleReporter, say

EXIT_CODES = """Exit codes: 0 done; 2 wrong run file or flag; 3 data; 4 model; 5 refused by the
coordinator or by this worker's policy; 6 ledger damaged; 7 coordinator not reached; 9 privacy
budget spent; 1 anything else; 130 interrupted."""

app = typer.Typer(
    help="Take part in a LoRand run with data that stays on this machine.\n\n" + EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(connecting.enrol)
app.command()(privacy_cli.privacy)
app.add_typer(privacy_cli.sums, name="sum")


@app.command()
def prepare(
    run: Annotated[Path, typer.Argument(help="The run file.")],
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Measure the direction scales on these examples; a few integers tell of them.",
        ),
    ] = None,
    model: Model = None,
    json_output: Json = False,
) -> None:
    """Load the run's model and write run.lock: its digests and trainable tensors."""
    from lorand_worker import preparing

    config = load(run)
    preparing.check(run, config, calibrate)
    report = _reporter(json_output)
    identity = preparing.prepare(
        config, calibrate, lambda of: _load_base(of, model, "cpu", report, prepares=True), report
    )
    lock = preparing.write(run, identity)
    manifest = identity.manifest
    result = {
        "lock": str(lock),
        "base_digest": identity.base_digest.hex(),
        "tensors": len(manifest.tensors),
        "weights": manifest.num_weights,
    }
    say(
        result,
        f"wrote {lock}: {len(manifest.tensors)} trainable tensors, {manifest.num_weights:,} "
        f"weights, base {identity.base_digest.hex()[:16]}",
        json_output,
    )


@app.command()
def calibrate(
    run: Annotated[Path, typer.Argument(help="The run file.")],
    data: Data,
    directions: Annotated[int, typer.Option(min=4, max=1024, help="Directions measured.")] = 16,
    batches: Annotated[int, typer.Option(min=2, max=1024, help="Batches measured, at most.")] = 8,
    write: Annotated[
        bool, typer.Option("--write", help="Put the suggestions into the run file.")
    ] = False,
    model: Model = None,
    device: Device = "auto",
    precision: Annotated[
        Precision, typer.Option(help="Of forward passes, as workers will run them.")
    ] = Precision.AUTO,
    threads: Threads = 0,
    json_output: Json = False,
) -> None:
    """Before round 1: suggest perturbation scale, batch size and learning rate from local data."""
    from lorand_worker import calibrating, preparing

    _set_threads(threads)
    config = load(run)
    if write:
        calibrating.check_not_begun(run, config)
    report = _reporter(json_output)
    if config.privacy.noised:
        report.note("suggestions follow from these examples without noise: give public ones")
    theirs = preparing.written(run, config)
    base = _load_base(config, model, device, report, theirs=theirs)
    if theirs is not None:
        guard.check_identity(base.identity, theirs)
    found = calibrating.measure(
        config, base, data, precision, num_directions=directions, num_batches=batches, report=report
    )
    if write:
        calibrating.write(run, found.suggestion)
    say(found.as_dict(), found.text(written=run if write else None), json_output)


@app.command()
def join(
    address: Address,
    data: Data,
    name: Annotated[str, typer.Option(help="Unique in the run; default: host and file.")] = "",
    seed_pool: Annotated[
        str,
        typer.Option(
            metavar="[K]",
            help="Take part only in a run with a finite seed pool, of size K if one is given.",
        ),
    ] = "",
    model: Model = None,
    device: Device = "auto",
    weights: KeptWeights = Weights.AUTO,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing",
            help="First-order runs with --weights copy: run layers again in the backward pass "
            "instead of keeping their activations.",
        ),
    ] = False,
    precision: Annotated[
        Precision,
        typer.Option(
            help="Of forward passes. auto: bfloat16 where it is faster here and harms no scalar."
        ),
    ] = Precision.AUTO,
    cache_memory_gb: CacheMemory = None,
    cache_disk_gb: CacheDisk = None,
    cache_dir: CacheDir = None,
    threads: Threads = 0,
    give_up_s: GiveUp = 600.0,
    credentials_file: CredentialsFile = None,
    insecure: Insecure = False,
    require_privacy: RequirePrivacy = False,
    max_epsilon: MaxEpsilon = None,
    trust_coordinator: TrustCoordinator = False,
    identity: IdentityFile = None,
    roster: RosterFile = None,
    min_members: MinMembers = 0,
    state: State = None,
    coordinator_key: CoordinatorKey = "",
    output: Annotated[Path | None, typer.Option(help="Write the adapter here at the end.")] = None,
    json_output: Json = False,
) -> None:
    """Join a run with private data and stay until it is finished.

    The texts never leave this machine. Interrupted or killed, the same command goes on.
    """
    from lorand import adapter
    from lorand_worker import data as data_files
    from lorand_worker.bench import ModelBench
    from lorand_worker.precision import choose
    from lorand_worker.resolution import check_perturbation
    from lorand_worker.session import Session, fetch_run
    from lorand_worker.spending import open_budget
    from lorand_worker.tasks import Forward

    known_key = heads.public_key(coordinator_key) if coordinator_key else None
    _set_threads(threads)
    report = _reporter(json_output)
    link = connecting.connect(address, give_up_s, credentials_file, insecure, state)
    policy = guard.Policy(
        guard.parse_seed_pool(seed_pool),
        require_privacy=require_privacy,
        max_epsilon=max_epsilon,
        trust_coordinator=trust_coordinator,
    )
    budget = None
    began = time.monotonic()
    try:
        who = connecting.name_of(link.shown, name, data)
        config, theirs = fetch_run(link, report.note)
        guard.check(config, policy)
        examples = data_files.load(data, config.task)
        guard.check_examples(config, len(examples), str(data))
        for label in data_files.missing_labels(examples, config.task):
            report.note(f"no example here is labelled {label!r}; other workers may have some")
        base = _load_base(config, model, device, report, weights, checkpointing, theirs)
        if theirs is not None:
            guard.check_identity(base.identity, theirs)
        for line in guard.disclosure(config, base.identity.manifest):
            report.note(line)
        check_perturbation(config, base.replica)
        folder = state or state_folder()
        budget = open_budget(config, base.identity, who, folder, data, policy, report)
        report.note(base.weights)
        chosen, why = choose(precision, config, base.device)
        report.note(why)
        forward = Forward(chosen, _cache_limits(cache_memory_gb, cache_disk_gb, cache_dir))
        mechanism = budget.mechanism(config) if budget is not None else None
        bench = ModelBench(base, config, examples, forward=forward, mechanism=mechanism)
        if bench.cut:
            length = config.model.max_length
            report.note(
                f"{bench.cut} of {len(examples)} examples are longer than model.max_length = "
                f"{length} tokens: the ends of their prompts are left out"
            )
        member = None
        if config.privacy.mode == "secure-sum" and budget is not None:
            from lorand_worker.membership import Pinned, member_of

            pinned = Pinned(identity, roster, min_members)
            multiplier = budget.account.release.multiplier
            member = member_of(pinned, config, base.identity, who, multiplier)
        session = Session(
            *(link, config, base.identity, bench, who, report, folder, budget, member),
            coordinator_key=known_key,
        )
        participant = session.run()
        report.close()
        if output is not None:
            adapter.save(adapter.of(participant.position), output)
    finally:
        report.close()
        link.close()
        if budget is not None:
            budget.close()
    counts, traffic = participant.counts, link.traffic
    result = {
        "worker": participant.worker,
        "name": who,
        "rounds": participant.position.committed,
        "contributions": counts.committed,
        "skipped": counts.skipped,
        "rejected": counts.rejected,
        "seconds": round(time.monotonic() - began, 1),
        "message_bytes_sent": traffic.sent,
        "message_bytes_received": traffic.received,
        "weights_digest": bench.replica.digest().hex(),
        "head": participant.position.head.hex(),
    }
    say(
        result,
        f"finished after {result['rounds']} rounds: {counts.committed} contributions of this "
        f"worker, {traffic.sent:,} bytes of messages sent, {traffic.received:,} received\n"
        f"weights {result['weights_digest']}",
        json_output,
    )


@app.command()
def evaluate(
    address: Address,
    data: Data,
    name: Annotated[str, typer.Option(help="Name in the ledger; default: host and file.")] = "",
    follow: Annotated[bool, typer.Option(help="Stay, measure as rounds commit, and post.")] = False,
    every: Annotated[int, typer.Option(min=1, help="With --follow: every so many rounds.")] = 10,
    model: Model = None,
    device: Device = "auto",
    weights: KeptWeights = Weights.AUTO,
    cache_memory_gb: CacheMemory = None,
    cache_disk_gb: CacheDisk = None,
    cache_dir: CacheDir = None,
    threads: Threads = 0,
    give_up_s: GiveUp = 600.0,
    credentials_file: CredentialsFile = None,
    insecure: Insecure = False,
    public_data: PublicData = False,
    json_output: Json = False,
) -> None:
    """Measure accuracy on held-out data: once, or along the run, posted to the ledger."""
    from lorand_worker import data as data_files
    from lorand_worker import session
    from lorand_worker.bench import ModelBench
    from lorand_worker.tasks import Forward

    _set_threads(threads)
    report = _reporter(json_output)
    link = connecting.connect(address, give_up_s, credentials_file, insecure)
    try:
        config, theirs = session.fetch_run(link, report.note)
        guard.check_evaluation(config, posts=follow, public=public_data)
        examples = data_files.load(data, config.task)
        base = _load_base(config, model, device, report, weights, theirs=theirs)
        if theirs is not None:
            guard.check_identity(base.identity, theirs)
        forward = Forward(limits=_cache_limits(cache_memory_gb, cache_disk_gb, cache_dir))
        score = session.evaluate(
            link,
            config,
            base.identity,
            ModelBench(base, config, examples, forward=forward),
            name=connecting.name_of(link.shown, name, data),
            every=every,
            follow=follow,
            report=report,
        )
    finally:
        report.close()
        link.close()
    if score is not None:
        say(
            {"accuracy": score.accuracy, "loss": score.loss, "examples": score.examples},
            f"{'token ' * (config.task.kind == 'causal-lm')}accuracy {score.accuracy:.4f}, "
            f"loss {score.loss:.4f} on {score.examples} examples",
            json_output,
        )


Source = Annotated[str, typer.Argument(help="An exported ledger file, or HOST:PORT.")]


@app.command()
def export(
    source: Source,
    folder: Annotated[Path, typer.Argument(help="Where to write.")],
    merged: Annotated[bool, typer.Option(help="Also write full weights (safetensors).")] = False,
    model: Model = None,
    credentials_file: CredentialsFile = None,
    insecure: Insecure = False,
    json_output: Json = False,
) -> None:
    """Write the kilobyte adapter of a run and, with --merged, the whole fine-tuned model."""
    from lorand import adapter
    from lorand_worker import merge

    position = connecting.position(source, credentials_file, insecure)
    size = adapter.save(adapter.of(position), folder)
    result: dict[str, Any] = {
        "folder": str(folder),
        "adapter_bytes": size,
        "rounds": position.committed,
    }
    text = (
        f"wrote {folder / adapter.WEIGHTS_FILE}: {size:,} bytes after {position.committed} rounds"
    )
    if merged:
        base = _load_at(position, model, "cpu", _reporter(json_output))
        result["merged"] = str(merge.save(base.loaded, position, folder / "merged"))
        result["weights_digest"] = base.replica.digest().hex()
        text += f"\nwrote {result['merged']}: the whole model"
    say(result, text, json_output)


@app.command()
def squeeze(
    source: Annotated[
        str,
        typer.Argument(help="Folder of an exported adapter, exported ledger file, or HOST:PORT."),
    ],
    folder: Annotated[Path, typer.Argument(help="Where to write.")],
    rank: Annotated[int, typer.Option(min=1, help="Rank that is kept of each layer's update.")],
    model: Model = None,
    credentials_file: CredentialsFile = None,
    insecure: Insecure = False,
    json_output: Json = False,
) -> None:
    """Write a run's LoRA layers at a smaller rank, as an adapter that the peft library opens."""
    from lorand import adapter
    from lorand_worker import squeeze as squeezing

    exported = Path(source).is_dir()
    if exported:
        position = adapter.position(adapter.load(Path(source)))
    else:
        position = connecting.position(source, credentials_file, insecure)
    squeezing.check(position.config, rank, folder)
    base = _load_at(position, model, "cpu", _reporter(json_output))
    kept = squeezing.save(base.loaded, position, rank, folder)
    result = {"folder": str(folder), "rank": rank, "kept": kept}
    say(result, squeezing.told(kept, rank, folder), json_output)


@app.command()
def replay(
    source: Source,
    model: Model = None,
    device: Device = "cpu",
    credentials_file: CredentialsFile = None,
    insecure: Insecure = False,
    json_output: Json = False,
) -> None:
    """Rebuild the weights from a ledger and the base model, and print their digest."""
    position = connecting.position(source, credentials_file, insecure)
    base = _load_at(position, model, device, _reporter(json_output))
    digest = base.replica.digest().hex()
    say(
        {"rounds": position.committed, "head": position.head.hex(), "weights_digest": digest},
        f"{position.committed} rounds replayed\nweights {digest}",
        json_output,
    )


def _reporter(json_output: bool) -> ConsoleReporter:
    report = ConsoleReporter(quiet=json_output)
    report.follow_log()
    return report


def _load_base(
    config: RunConfig,
    model: Path | None,
    device: str,
    report: ConsoleReporter,
    weights: Weights = Weights.COPY,
    checkpointing: bool = False,
    theirs: Identity | None = None,
    prepares: bool = False,
) -> Any:
    from lorand_worker.bench import load_base

    if model is not None and not model.is_dir():
        raise ConfigError(f"--model {model} is not a folder")
    report.note(f"loading {model or config.model.name}")
    return load_base(
        config,
        model,
        device,
        weights,
        checkpointing=checkpointing,
        theirs=theirs,
        prepares=prepares,
    )


def _load_at(position: Any, model: Path | None, device: str, report: ConsoleReporter) -> Any:
    """The run's model with the weights of a position of the run."""
    from lorand_worker.bench import bring

    base = _load_base(position.config, model, device, report, theirs=position.identity)
    guard.check_identity(base.identity, position.identity)
    bring(base.replica, position)
    base.replica.settle()
    return base


def _cache_limits(memory_gb: float | None, disk_gb: float | None, folder: Path | None) -> Any:
    from lorand_worker.cache import Limits

    memory, disk = (None if gb is None else int(gb * 1e9) for gb in (memory_gb, disk_gb))
    return Limits(memory, disk, folder)


def _set_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)  # the kernels take as many


def main() -> None:
    """Run the command; report errors as one sentence and an exit code."""
    try:
        app(args=with_optional_value(sys.argv[1:], "--seed-pool", guard.ANY))
    except LorandError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
