"""Forward passes: precision, groups of similar length, and hidden states kept.

Claims: bfloat16 passes are faster where the processor has them and change scalars less than another
batch does; groups by length and launch cost beat groups of eight; frozen layers that run once an
example save their share of every round, from memory or disk. MiniLM; rows interleaved in one
process, medians of nine. Needs the data sets of experiments.federation.

    python -m benchmarks.forward --json --seeds 3 > benchmarks/results/forward.json

About half an hour; without --seeds fifteen minutes.
"""

import contextlib
import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from experiments import banking77, federation, uci_sentiment
from experiments.provenance import provenance
from torch import nn

from benchmarks import quality
from benchmarks.quality import PRECISIONS, config_of
from lorand_worker.bench import Base, ModelBench, load_base, task_for
from lorand_worker.cache import Limits
from lorand_worker.data import Examples
from lorand_worker.estimators import Order
from lorand_worker.precision import Precision, bfloat16_speedup, passes
from lorand_worker.tasks import Classification, Forward, Task

REPEATS: Final = 9
CPU: Final = torch.device("cpu")
Work = dict[str, Callable[[], Any]]


def medians(work: Work) -> dict[str, float]:
    """Return the median milliseconds of each row, interleaved, without a first turn."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(REPEATS + 1):
        for name, call in work.items():
            began = time.perf_counter()
            call()
            if turn:
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def base_of(trainable: str) -> Base:
    """MiniLM in a run that trains these layers; no parameter asks for gradients."""
    base = load_base(config_of("spsa", trainable), federation.minilm(), "cpu")
    for parameter in base.loaded.module.parameters():
        parameter.requires_grad_(False)
    return base


# -- precision -------------------------------------------------------------------------------------


def speed(base: Base, length: int) -> dict[str, float]:
    """Whole passes over 16 texts of this length, all weights trained.

    `forward_bfloat16_weights` has weights that were cast before: what it saves is what casting
    costs in every pass of a zeroth-order step, where weights never stay.
    """
    module = base.loaded.module
    cast = copy.deepcopy(module).bfloat16()
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (16, length), generator=source)
    mask = torch.ones_like(ids)

    def forward(of: nn.Module, precision: Precision) -> None:
        with torch.no_grad(), passes(precision, CPU):
            of(ids, mask)

    def both(precision: Precision) -> None:
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        with passes(precision, CPU):
            logits = module(ids, mask)
        loss = nn.functional.cross_entropy(logits.float(), torch.zeros(16, dtype=torch.long))
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in module.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None

    work: Work = {f"forward_{p}": partial(forward, module, p) for p in PRECISIONS}
    work["forward_bfloat16_weights"] = partial(forward, cast, Precision.FLOAT32)
    work |= {f"forward_backward_{p}": partial(both, p) for p in PRECISIONS}
    return medians(work)


# -- groups ----------------------------------------------------------------------------------------


class Eights(Classification):
    """A task that cuts its batches into groups of eight in the order of length."""

    size = 8

    def _cut(self, batch: Sequence[int]) -> list[list[int]]:
        order = sorted(batch, key=lambda i: len(self._ids[i]))
        return [order[i : i + self.size] for i in range(0, len(order), self.size)]


class Whole(Eights):
    """A task that does not cut the batches below."""

    size = 64


def grouping(base: Base, data: Examples, size: int, precision: Precision) -> dict[str, float]:
    """Milliseconds a batch of this size: in one piece, in groups of eight, as chosen."""
    source = random.Random(0)
    batches = [source.sample(range(len(data)), size) for _ in range(REPEATS + 1)]
    kinds = {"whole": Whole, "eights": Eights, "chosen": Classification}
    tasks = {
        name: kind(
            base.loaded,
            data,
            trainable=set(base.loaded.module.state_dict()),
            max_length=128,
            forward=Forward(precision),
        )
        for name, kind in kinds.items()
    }
    turns = {name: iter(batches) for name in kinds}

    @torch.no_grad()
    def run(name: str) -> None:
        tasks[name].loss(next(turns[name]))

    work: Work = {name: partial(run, name) for name in kinds}
    groups = statistics.mean(len(tasks["chosen"]._cut(batch)) for batch in batches)
    return {**medians(work), "chosen_groups": round(groups, 1)}


# -- kept hidden states ----------------------------------------------------------------------------


def caching(data: Examples) -> dict[str, Any]:
    """A zeroth-order round of three directions, and an evaluation, by where states are kept.

    The last two layers and the head are trained; examples were all seen before. `each_pass` runs
    the frozen layers in every pass, as without a boundary.
    """
    config = config_of("spsa", "last:2")
    places = {"memory": Limits(1 << 40, 0), "disk": Limits(0, 1 << 40), "nowhere": Limits(0, 0)}
    rounds: Work = {}
    scores: Work = {}
    indices = np.arange(3)
    kept: dict[str, Task] = {}
    for name in (*places, "each_pass"):
        base = base_of("last:2")
        forward = Forward(limits=places.get(name, Limits(0, 0)))
        bench = ModelBench(base, config, data, random.Random(0), forward=forward)
        assert isinstance(bench._task, Task)
        kept[name] = bench._task
        if name == "each_pass":
            bench._task._boundary.depth = 0
        bench.score()
        rounds[name] = partial(bench.measure, Order(indices))
        scores[name] = bench.score
    cache = kept["disk"]._cache
    return {
        "round_ms": medians(rounds),
        "score_ms": medians(scores),
        "examples": len(data),
        "bytes_kept": cache.disk_bytes,
        **_padding(task_for(base_of("last:2"), config, data)),
    }


@torch.no_grad()
def _padding(task: Task) -> dict[str, float]:
    """Largest difference of hidden states between an example alone and one padded to 128."""
    worst, same = 0.0, 0
    for i in range(32):
        ids, mask = task._pad_ids([i])
        length = ids.shape[1]
        room = (0, 128 - length)
        alone = task._boundary.states(ids, mask)[0]
        padded = task._boundary.states(nn.functional.pad(ids, room), nn.functional.pad(mask, room))
        worst = max(worst, float((alone - padded[0, :length]).abs().max()))
        same += torch.equal(alone, padded[0, :length])
    return {"padding_max_difference": worst, "padding_same_bits_of_32": same}


def main() -> None:
    """Measure and print."""
    options = quality.parser(__doc__).parse_args()
    shards, _ = uci_sentiment.shards_and_test(False)
    uci = federation.subset(federation.pool(shards), range(2700))
    bank = banking77.read("train.csv")[0]
    bank = Examples(bank.texts, (0,) * len(bank))  # lengths count here, not labels
    base = base_of("all")
    result: dict[str, Any] = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        here: dict[str, Any] = {"bfloat16_speedup_at_start": round(bfloat16_speedup(CPU), 2)}
        here |= {f"batch16_length{length}_ms": speed(base, length) for length in (32, 128)}
        for name, data in (("uci", uci), ("banking77", bank)):
            here |= {
                f"groups_{name}_batch{size}_{precision}_ms": grouping(base, data, size, precision)
                for size in (16, 64)
                for precision in PRECISIONS
            }
        here["caching_uci"] = caching(federation.subset(uci, range(320)))
        result[f"threads_{threads}"] = here
    torch.set_num_threads(1)
    result["scalars"] = [row for rule in ("last:2", "all") for row in quality.scalars(rule)]
    if options.seeds:
        kinds = ("backprop", "spsa")
        result["accuracy_uci"] = [quality.accuracy(kind, options.seeds) for kind in kinds]
    result |= {"repeats": REPEATS, "provenance": provenance()}
    print(json.dumps(result, indent=None if options.json else 1))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
