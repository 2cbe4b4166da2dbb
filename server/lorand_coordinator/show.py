"""What the coordinator's commands print: status panels and ledger rows."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table

from lorand import ledger
from lorand.v1 import ledger_pb2 as pb
from lorand.v1 import status_pb2 as status
from lorand_coordinator import ledgers, payoff
from lorand_coordinator.diagnostics import Recent
from lorand_coordinator.ledgers import Location

EVALUATIONS_SHOWN = 5


def as_dict(answer: status.GetStatusResponse) -> dict[str, Any]:
    """Return a status for JSON: every field present, digests in hexadecimal, numbers as numbers."""
    content: dict[str, Any] = MessageToDict(
        answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    content["head"] = answer.head.hex()
    content["coefficients_digest"] = answer.coefficients_digest.hex()
    content["entries"] = answer.entries
    for row, worker in zip(content["workers"], answer.workers, strict=True):
        row["bytes_received"], row["bytes_sent"] = worker.bytes_received, worker.bytes_sent
    return content


def panel(answer: status.GetStatusResponse) -> RenderableType:
    """Return a status for people."""
    if answer.phase == "standing by":  # it knows nothing of the run's progress
        text = f"{answer.phase}: {answer.reason}"
        return Panel(text, title=f"run {answer.name}", title_align="left")
    loss = f", loss {answer.loss:.4f}" if answer.HasField("loss") else ""
    lines: list[RenderableType] = [
        f"{answer.phase}: {answer.reason}",
        f"{answer.committed} of {answer.rounds} rounds committed, {answer.abandoned} abandoned, "
        f"{answer.entries} entries{loss}",
        f"head {answer.head.hex()[:16]}  coefficients {answer.coefficients_digest.hex()[:16]}",
    ]
    if answer.workers:
        table = Table(box=None, pad_edge=False)
        for column in ("worker", "name", "state", "contributions", "rejected", "bytes in", "out"):
            table.add_column(column, justify="left" if column in ("name", "state") else "right")
        for worker in answer.workers:
            table.add_row(
                str(worker.worker),
                worker.name,
                "connected" if worker.connected else "away",
                str(worker.contributions),
                str(worker.rejected),
                f"{worker.bytes_received:,}",
                f"{worker.bytes_sent:,}",
            )
        lines.append(table)
    for evaluation in answer.evaluations[-EVALUATIONS_SHOWN:]:
        lines.append(
            f"after {evaluation.committed} rounds: accuracy {evaluation.accuracy:.3f}, loss "
            f"{evaluation.loss:.4f} on {evaluation.examples} examples ({evaluation.evaluator})"
        )
    lines += answer.findings
    return Panel(Group(*lines), title=f"run {answer.name}", title_align="left")


def bodies(path: Location) -> Iterator[bytes]:
    """Yield the entries of a ledger, in a store or exported. Raises LedgerError."""
    if ledger.is_file(path):
        yield from ledger.read_file(Path(path))
        return
    with closing(ledgers.reader(path)) as store:
        yield from store.entries()


def export(path: Location, target: Path) -> int:
    """Write a portable file of a ledger, with statements and the signature of its end.

    Returns the number of entries. Raises LedgerError when the ledger is damaged, OSError when the
    target cannot be written.
    """
    if ledger.is_file(path):
        source = Path(path)
        bodies, statements = list(ledger.read_file(source)), list(ledger.file_statements(source))
        return ledger.write_file(target, bodies, ledger.file_signature(source), statements)
    with closing(ledgers.reader(path)) as store:
        signature = store.signature(len(store) - 1)
        statements = [stated.body for stated in store.statements()]
        return ledger.write_file(target, store.entries(), signature, statements)


def rows(path: Location, last: int) -> list[dict[str, Any]]:
    """Return the last entries as plain dictionaries."""
    kept: list[dict[str, Any]] = []
    for body in bodies(path):
        kept.append(_row(ledger.parse(body)))
        del kept[:-last]
    return kept


def figures(recent: Recent, comparison: payoff.Comparison) -> dict[str, Any]:
    """Return the figures of the last rounds, and of the run's subspace, for JSON."""
    total = recent.total
    ratio, error = total.signal_to_noise or (None, None)
    count = max(total.scalars, 1)
    return {
        "rounds": len(recent.rounds),
        "scalars": total.scalars,
        "zero_share": total.zeros / count,
        "clipped_share": total.clipped / count,
        "signal_to_noise": ratio,
        "standard_error": error,
        "scale_exponent": total.scale_exponent,
        "subspace": _kept(comparison),
        "findings": [finding.text for finding in payoff.told(recent, comparison)],
    }


def _kept(comparison: payoff.Comparison) -> dict[str, Any] | None:
    """What the subspace keeps, each with its standard error; None where nothing was compared."""
    if not comparison.probes:
        return None
    kept = payoff.kept(comparison)
    return {
        "probes": comparison.probes,
        "energy": kept.energy and list(kept.energy),
        "curvature": kept.curvature and list(kept.curvature),
        "progress": kept.progress and list(kept.progress),
        "given_up": comparison.given_up,
    }


def figures_text(content: dict[str, Any]) -> str:
    """Return the figures for people."""
    head = (
        f"last {content['rounds']} rounds, {content['scalars']} scalars: "
        f"{content['zero_share']:.0%} zero, {content['clipped_share']:.0%} clipped"
    )
    if content["signal_to_noise"] is not None:
        head += (
            f", signal-to-noise {content['signal_to_noise']:.2f} ± {content['standard_error']:.2f}"
        )
    return "\n".join([head, *content["findings"]])


def _row(entry: pb.Entry) -> dict[str, Any]:
    kind = entry.WhichOneof("kind") or ""
    row: dict[str, Any] = {
        "sequence": entry.sequence,
        "round_index": entry.round_index,
        "kind": kind,
    }
    match kind:
        case "start":
            row["base_digest"] = entry.start.base_digest.hex()
        case "commit":
            row["workers"] = list(entry.commit.workers)
            row["scale"] = entry.commit.scale
            row["code_bytes"] = len(entry.commit.codes)
            row["scale_exponent"] = entry.commit.scale_exponent
        case "abandon":
            row["reason"] = entry.abandon.reason
        case "member":
            row["worker"], row["name"] = entry.member.worker, entry.member.name
        case "evaluation":
            row["evaluator"] = entry.evaluation.evaluator
            row["committed"] = entry.evaluation.committed
            row["accuracy"] = entry.evaluation.accuracy
            row["loss"] = entry.evaluation.loss
        case "finish":
            row["committed"] = entry.finish.committed
    return row


def line(row: dict[str, Any]) -> str:
    """Return a row as one line of text."""
    rest = "  ".join(
        f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key not in ("sequence", "round_index", "kind")
    )
    return f"{row['sequence']:>6}  round {row['round_index']:<5} {row['kind']:<10} {rest}"
