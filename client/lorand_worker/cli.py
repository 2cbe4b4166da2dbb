"""lr-worker: take part in a run with private data, evaluate it, and keep what it learned."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

# A worker's data and model may be offline; no library may phone home unasked.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.console import Console

from lorand import heads, tracking
from lorand.config import RunConfig, load
from lorand.errors import LorandError
from lorand.logs import LogFormat, LogFormatFlag
from lorand.otel import OTel
from lorand.tracking import ReportTo, TrackingFolder
from lorand_worker import connecting, guard, privacy_cli
from lorand_worker.doctor.command import doctor
from lorand_worker.flags import (
    AdapterSource,
    Address,
    CacheDir,
    CacheDisk,
    CacheMemory,
    Checkpointing,
    Columns,
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
    Source,
    State,
    Threads,
    TrustCoordinator,
    Validation,
    with_optional_value,
)
from lorand_worker.memory import Weights
from lorand_worker.own_estimator import OwnEstimator
from lorand_worker.precision import Precision
from lorand_worker.reporting import ConsoleReporter, say
from lorand_worker.sources import parse

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
app.command()(doctor)
app.command()(privacy_cli.privacy)
app.add_typer(privacy_cli.sums, name="sum")


@app.command()
def prepare(
    run: Annotated[Path, typer.Argument(help="The run file.")],
    calibrate: Annotated[
        Any,  # a Source: typer takes no unions
        typer.Option(
            parser=parse,
            metavar="DATA",
            help="Measure the direction scales on these examples; a few integers tell of them.",
        ),
    ] = None,
    columns: Columns = "",
    pin: Annotated[
        bool,
        typer.Option("--pin", help="Put the model's commit into the run file, as its revision."),
    ] = False,
    model: Model = None,
    json_output: Json = False,
) -> None:
    """Load the run's model and write run.lock: its digests and trainable tensors."""
    from lorand_worker import data as data_files
    from lorand_worker import preparing
    from lorand_worker.bench import load_base

    config = load(run)
    preparing.check(run, config, calibrate)
    report = _reporter(json_output)
    examples = None
    if calibrate is not None:
        examples = data_files.load(calibrate, data_files.mapped(config.task, columns))
    identity = preparing.prepare(
        config, examples, lambda of: load_base(of, model, "cpu", prepares=True), report
    )
    preparing.pin(run, config, model, report, pin)
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
    columns: Columns = "",
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
    from lorand_worker import data as data_files
    from lorand_worker.bench import load_base

    _set_threads(threads)
    config = load(run)
    if write:
        calibrating.check_not_begun(run, config)
    report = _reporter(json_output)
    if config.privacy.noised:
        report.note("suggestions follow from these examples without noise: give public ones")
    theirs = preparing.written(run, config)
    base = load_base(config, model, device, theirs=theirs)
    if theirs is not None:
        guard.check_identity(base.identity, theirs)
    found = calibrating.measure(
        config,
        base,
        data_files.load(data, data_files.mapped(config.task, columns)),
        precision,
        num_directions=directions,
        num_batches=batches,
        source=str(data),
        report=report,
    )
    if write:
        calibrating.write(run, found.suggestion)
    say(found.as_dict(), found.text(written=run if write else None), json_output)


@app.command()
def join(
    address: Address,
    data: Data,
    columns: Columns = "",
    validation: Validation = 0.0,
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
    checkpointing: Checkpointing = False,
    precision: Annotated[
        Precision,
        typer.Option(
            help="Of forward passes. auto: bfloat16 where it is faster here and harms no scalar."
        ),
    ] = Precision.AUTO,
    estimator: Annotated[
        OwnEstimator,
        typer.Option(
            help="How scalars are measured here, where the run leaves it to its workers "
            "(estimator.mixed): spsa by forward passes, backprop by one backward pass."
        ),
    ] = OwnEstimator.RUN,
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
    report_to: ReportTo = "",
    tracking_dir: TrackingFolder = None,
    otel: OTel = "",
    log_format: LogFormatFlag = LogFormat.TEXT,
    json_output: Json = False,
) -> None:
    """Join a run with private data and stay until it is finished.

    The texts never leave this machine. Interrupted or killed, the same command goes on.
    """
    from lorand_worker.joining import Joining
    from lorand_worker.joining import join as join_run
    from lorand_worker.membership import Pinned
    from lorand_worker.traced import Figures

    known_key = heads.public_key(coordinator_key) if coordinator_key else None
    _set_threads(threads)
    asked = Joining(
        address=address,
        data=data,
        columns=columns,
        validation=validation,
        name=name,
        policy=guard.Policy(
            guard.parse_seed_pool(seed_pool),
            require_privacy=require_privacy,
            max_epsilon=max_epsilon,
            trust_coordinator=trust_coordinator,
        ),
        model=model,
        device=device,
        weights=weights,
        checkpointing=checkpointing,
        precision=precision,
        estimator=estimator,
        limits=_cache_limits(cache_memory_gb, cache_disk_gb, cache_dir),
        give_up_s=give_up_s,
        credentials=credentials_file,
        insecure=insecure,
        pinned=Pinned(identity, roster, min_members),
        state=state,
        coordinator_key=known_key,
        output=output,
        otel=otel,
    )
    report = _reporter(json_output, log_format, report_to)

    def tracked(config: RunConfig, who: str) -> Figures:
        report.report_to(report_to, config, who, tracking_dir)
        return report.figures

    try:
        joined = join_run(asked, report, tracked=tracked)
    finally:
        report.close()
    say(joined.as_dict(), joined.text(), json_output)


@app.command()
def evaluate(
    address: Address,
    data: Data,
    columns: Columns = "",
    validation: Validation = 0.0,
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
    report_to: ReportTo = "",
    tracking_dir: TrackingFolder = None,
    log_format: LogFormatFlag = LogFormat.TEXT,
    json_output: Json = False,
) -> None:
    """Measure accuracy on held-out data: once, or along the run, posted to the ledger."""
    from lorand_worker import data as data_files
    from lorand_worker import session
    from lorand_worker.bench import ModelBench, load_base
    from lorand_worker.tasks import Forward

    _set_threads(threads)
    report = _reporter(json_output, log_format, report_to)
    link = connecting.connect(address, give_up_s, credentials_file, insecure)
    try:
        config, theirs = session.fetch_run(link, report.note)
        who = connecting.name_of(link.shown, name, data)
        report.report_to(report_to, config, who, tracking_dir)
        guard.check_evaluation(config, posts=follow, public=public_data)
        examples = data_files.load(data, data_files.mapped(config.task, columns))
        if validation:
            _, examples = data_files.hold_out(examples, validation, str(data))
        base = load_base(config, model, device, weights, theirs=theirs)
        if theirs is not None:
            guard.check_identity(base.identity, theirs)
        forward = Forward(limits=_cache_limits(cache_memory_gb, cache_disk_gb, cache_dir))
        score = session.evaluate(
            link,
            config,
            base.identity,
            ModelBench(base, config, examples, forward=forward),
            name=who,
            every=every,
            follow=follow,
            report=report,
            figures=report.figures,
        )
    finally:
        report.close()
        link.close()
    if score is not None:
        say(
            {"accuracy": score.accuracy, "loss": score.loss, "examples": score.examples},
            score.text(),
            json_output,
        )


@app.command()
def export(
    source: Source,
    folder: Annotated[Path, typer.Argument(help="Where to write.")],
    merged: Annotated[bool, typer.Option(help="Also write full weights (safetensors).")] = False,
    about_data: Annotated[
        str, typer.Option(help="What the card says of the data, which no ledger tells.")
    ] = "",
    model: Model = None,
    credentials_file: CredentialsFile = None,
    insecure: Insecure = False,
    json_output: Json = False,
) -> None:
    """Write the kilobyte adapter of a run and, with --merged, the whole fine-tuned model.

    Each has a card, README.md: rounds, bytes, privacy spent, evaluation and ledger head.
    """
    from lorand import adapter, card
    from lorand_worker import merge

    facts = card.Facts(about_data)
    position = connecting.position(source, credentials_file, insecure, facts)
    facts.account(position.config)
    size = adapter.save(adapter.of(position), folder)
    card.write(adapter.of(position), facts, folder, merged=False)
    result: dict[str, Any] = {
        "folder": str(folder),
        "adapter_bytes": size,
        "rounds": position.committed,
    }
    text = (
        f"wrote {folder / adapter.WEIGHTS_FILE}: {size:,} bytes after {position.committed} rounds"
    )
    if merged:
        base = _load_at(position, model, "cpu", json_output)
        result["merged"] = str(merge.save(base.loaded, position, folder / "merged", facts))
        result["weights_digest"] = base.replica.digest().hex()
        text += f"\nwrote {result['merged']}: the whole model"
    say(result, text, json_output)


@app.command()
def squeeze(
    source: AdapterSource,
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
    base = _load_at(position, model, "cpu", json_output)
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
    base = _load_at(position, model, device, json_output)
    digest = base.replica.digest().hex()
    say(
        {"rounds": position.committed, "head": position.head.hex(), "weights_digest": digest},
        f"{position.committed} rounds replayed\nweights {digest}",
        json_output,
    )


def _reporter(
    json_output: bool, log_format: LogFormat = LogFormat.TEXT, report_to: str = ""
) -> ConsoleReporter:
    tracking.names_in(report_to)  # an unknown one is told now, not when the run is known
    report = ConsoleReporter(quiet=json_output, log_format=log_format)
    report.follow_log()
    return report


def _load_at(position: Any, model: Path | None, device: str, json_output: bool) -> Any:
    """The run's model with the weights of a position of the run."""
    from lorand_worker.bench import bring, load_base

    _reporter(json_output)
    base = load_base(position.config, model, device, theirs=position.identity)
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
