"""Flags that several commands of lr-worker share: types that say their own help."""

from pathlib import Path
from typing import Annotated

import typer

from lorand_worker.memory import Weights

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Address = Annotated[str, typer.Argument(help="HOST:PORT of the coordinator.")]
Data = Annotated[
    Path, typer.Option(help="CSV, TSV or JSONL file with the columns of the run's [task].")
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
