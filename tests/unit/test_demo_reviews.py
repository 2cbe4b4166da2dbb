"""The demo's reviews: enough of them, balanced, and none written twice."""

import csv
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "data"
DOMAINS = ("hotels", "gadgets", "restaurants")
NEAR = 0.6
"""Share of common words from which two reviews count as near-duplicates."""


def read(domain: str, split: str) -> list[tuple[str, str]]:
    with (DATA / f"{domain}-{split}.csv").open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("split", "least"), [("train", 300), ("test", 100)])
def test_each_domain_has_enough_reviews_in_balance(domain: str, split: str, least: int) -> None:
    rows = read(domain, split)
    counts = Counter(label for _, label in rows)
    assert len(rows) >= least
    assert counts["positive"] == counts["negative"] == len(rows) / 2


def test_reviews_vary_in_length() -> None:
    lengths = [len(t.split()) for d in DOMAINS for s in ("train", "test") for t, _ in read(d, s)]
    assert min(lengths) <= 4
    assert max(lengths) >= 30


def test_no_two_reviews_are_nearly_the_same() -> None:
    texts = [text for d in DOMAINS for s in ("train", "test") for text, _ in read(d, s)]
    words = [frozenset(re.findall(r"[a-z']+", text.lower())) for text in texts]
    near = [
        (texts[i], texts[j])
        for i, j in combinations(range(len(texts)), 2)
        if min(len(words[i]), len(words[j])) > NEAR * max(len(words[i]), len(words[j]))
        and len(words[i] & words[j]) > NEAR * len(words[i] | words[j])
    ]
    assert near == []
