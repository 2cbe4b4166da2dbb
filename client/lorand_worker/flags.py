"""Flags of lr-worker that several commands share or that need many words: types with their help."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lorand_worker.memory import Weights
from lorand_worker.sources import parse

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Address = Annotated[
    str, typer.Argument(help="HOST:PORT of the coordinator; of several: HOST:PORT,HOST:PORT.")
]
Source = Annotated[str, typer.Argument(help="An exported ledger file, or HOST:PORT.")]
AdapterSource = Annotated[
    str, typer.Argument(help="Folder of an exported adapter, exported ledger file, or HOST:PORT.")
]
Data = Annotated[
    Any,  # a Source: typer takes no unions
    typer.Option(
        parser=parse,
        metavar="FILE|hub:OWNER/NAME:SPLIT",
        help="A CSV, TSV, JSONL or Parquet file with the columns of the run's \\[task], or a data "
        "set of the hub (pip install 'lorand\\[data]' for it and Parquet).",
    ),
]
Columns = Annotated[
    str,
    typer.Option(
        metavar="text=COLUMN,…",
        help="What the columns are called here, where it is not as in the run's \\[task]: text and "
        "label, prompt and answer, or messages.",
    ),
]
Validation = Annotated[
    float,
    typer.Option(
        min=0,
        max=0.9,
        help="Share of the examples that is never trained on; a digest of each decides, so that "
        "they are the same every time, for join and evaluate alike.",
    ),
]
Model = Annotated[Path | None, typer.Option(help="Local copy of the run's model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
KeptWeights = Annotated[
    Weights,
    typer.Option(
        help="copy: base beside working weights, twice the memory. layerwise: made as each layer "
        "runs, from the base. auto: copy where there is room and the base is not quantised."
    ),
]
Checkpointing = Annotated[
    bool,
    typer.Option(
        "--checkpointing",
        help="First-order runs with --weights copy: run layers again in the backward pass "
        "instead of keeping their activations.",
    ),
]
CacheMemory = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1e9,
        help="GB of memory for hidden states that cannot change; default: a quarter of what is "
        "available.",
    ),
]
CacheDisk = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1e9,
        help="GB of disk for hidden states beyond that, in a file without a name that is gone when "
        "the worker ends; 0: none; default: a quarter of what is free.",
    ),
]
CacheDir = Annotated[Path | None, typer.Option(help="Where that file is; default: /var/tmp.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: all.")]
GiveUp = Annotated[float, typer.Option(min=1, help="Seconds to look for an absent coordinator.")]
RequirePrivacy = Annotated[
    bool, typer.Option("--require-privacy", help="Take part only in a run with \\[privacy].")
]
MaxEpsilon = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Take part only in a private run whose epsilon, with what other runs spent of the "
        "same data file, is at most this.",
    ),
]
TrustCoordinator = Annotated[
    bool,
    typer.Option(
        "--trust-coordinator",
        help="With --require-privacy or --max-epsilon: runs whose coordinator adds the noise "
        "(privacy.mode central) are private enough.",
    ),
]
CredentialsFile = Annotated[
    Path | None,
    typer.Option(
        "--credentials",
        envvar="LORAND_CREDENTIALS",
        help="This member's key and certificate; default: a file a coordinator, in credentials/ of "
        "--state.",
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure", help="A coordinator on this machine that serves with --insecure, too."
    ),
]
IdentityFile = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        help="This worker's key, of `lr-worker sum key`: for statements and secure sums.",
    ),
]
RosterFile = Annotated[
    Path | None,
    typer.Option("--roster", help="Secure sums: the roster that the members agreed on."),
]
MinMembers = Annotated[
    int,
    typer.Option(min=0, max=32, help="Secure sums: the fewest members to be summed with."),
]
CoordinatorKey = Annotated[
    str,
    typer.Option(
        metavar="HEX",
        help="The public key that the run's ledger is signed by, as `lr-coordinator serve` prints "
        "it; default: the first one seen, kept in --state.",
    ),
]
State = Annotated[
    Path | None,
    typer.Option(
        help="Folder for what must survive a restart: privacy budgets, credentials, what codes of "
        "local steps lost, and the history that was seen; default: ~/.local/state/lorand."
    ),
]
PublicData = Annotated[
    bool,
    typer.Option(
        "--public-data",
        help="Private runs: these examples are nobody's secret, so that exact results may be "
        "posted.",
    ),
]


def with_optional_value(arguments: list[str], option: str, default: str) -> list[str]:
    """Return the arguments with the default where an option stands without a number.

    >>> with_optional_value(["join", "--seed-pool", "--json"], "--seed-pool", "any")
    ['join', '--seed-pool', 'any', '--json']
    """
    result = []
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        result.append(argument)
        if argument == option and not following.isdigit():
            result.append(default)
    return result
