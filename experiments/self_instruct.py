"""Self-instruct's tasks, as instructions with an answer, among workers by their application.

The tasks for users name an application each; the seed tasks name none.
"""

import json
import random
from collections.abc import Sequence
from typing import Final

from experiments import federation
from lorand_worker.data import Pairs

NAME: Final = "self_instruct"
FILES: Final = ("seed_tasks.jsonl", "user_oriented_instructions.jsonl")
LONGEST: Final = 300
"""Most characters of a prompt, and of an answer."""


def read() -> tuple[Pairs, tuple[str, ...]]:
    """Return the tasks that are short enough, and the application of each ("": a seed task)."""
    found = []
    for name in FILES:
        for line in (federation.DATA / NAME / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            given = row["instances"][0]
            prompt = "\n".join(filter(None, (row["instruction"].strip(), given["input"].strip())))
            answer = given["output"].strip()
            if len(prompt) <= LONGEST and 0 < len(answer) <= LONGEST:
                found.append((prompt, answer, row.get("motivation_app", "").strip().lower()))
    prompts, answers, origins = zip(*found, strict=True)
    return Pairs(prompts, answers), origins


def dealt(origins: Sequence[str], workers: int, seed: int) -> list[list[int]]:
    """Return each worker's places: those of one origin together, those of none at random.

    Origins come in a drawn order to the worker that has least; so do single tasks then.
    """
    draw = random.Random(f"{seed}/dealt")
    groups: dict[str, list[int]] = {}
    for place, origin in enumerate(origins):
        groups.setdefault(origin, []).append(place)
    single = [[place] for place in groups.pop("", [])]
    together = list(groups.values())
    draw.shuffle(together)
    draw.shuffle(single)
    shards: list[list[int]] = [[] for _ in range(workers)]
    for places in (*together, *single):
        min(shards, key=len).extend(places)
    return shards


def shards_and_scored(workers: int, seed: int, *, held_out: bool) -> tuple[list[Pairs], Pairs]:
    """Return the workers' shards and what is scored: the test tenth, or a tenth of the rest."""
    tasks, origins = read()
    train, scored = federation.cut(len(tasks))
    if held_out:
        kept, out = federation.cut(len(train))
        train, scored = [train[i] for i in kept], [train[i] for i in out]
    shards = dealt([origins[i] for i in train], workers, seed)
    return [tasks.only([train[i] for i in shard]) for shard in shards], tasks.only(scored)
