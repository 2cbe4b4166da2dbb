"""Tables and plots of the audit, from its results."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import plots
from experiments.plots import Curve, Panel

Row = dict[str, Any]
Parts = dict[str, Any]
FAMILIES = {"Mechanism": "as it is", "HalfNoise": "half the noise", "NoClip": "no clip"}
MODELS = {
    "last:1": "last layer, head",
    "all": "everything",
    "name:word_embeddings|head": "embedding, head",
}


def compact(text: str) -> str:
    """Return indented JSON with each innermost object or list on one line."""

    def joined(match: re.Match[str]) -> str:
        return re.sub(r"\s*\n\s*", " ", match.group())

    text = re.sub(r"\[[^\[\]{}]*\]", joined, text)
    return re.sub(r"\{[^{}]*\}", joined, text)


def page(about: str, parts: Parts) -> str:
    """Return the whole page."""
    lines = ["# privacy_audit", "", about, "", "Means ± standard errors, over seeds or sentences."]
    makers = {"A1": _a1, "A2": _a2, "A3": _a3, "A4": _a4, "A5": _a5, "R": _r}
    for name, make in makers.items():
        lines += ["", *make(parts[name])]
    return "\n".join([*lines, "", _origin(parts)]) + "\n"


def _a1(part: Row) -> list[str]:
    zeroth = [r for r in part["zeroth_order"] if r["batch_size"] == 1 and r["codec"] != "float"]
    noise = ", ".join(
        f"{_pm(r['error'])} at the noise of a run of epsilon {r['epsilon']}" for r in part["noise"]
    )
    return [
        "## A1: how much of a gradient comes back",
        "",
        "MiniLM's head, d = 770, one sentence, SPSA scalars of a pool of 4,096. Relative error of",
        "the shortest gradient that fits, and where the attacker knows that both classes share one",
        "row; theory: √(1 − K/d) of independent directions. Those of a pool repeat each other on a",
        "tensor smaller than the pool, so that more of them are needed.",
        "",
        *_table(
            ("scalars", "codec", "error", "row known", "theory"),
            zeroth,
            lambda r: (
                f"{r['scalars']:,}",
                r["codec"],
                _pm(r["error"]),
                _pm(r["error_structure_known"]),
                f"{r['theory']:.3f}",
            ),
        ),
        "",
        f"With noise, 1,155 scalars: {noise}.",
        "",
        "First-order sketches, back-projected: cosine with the gradient, and how many of the",
        "longest hundredth of all matrices' rows are among the estimate's longest (chance .01).",
        "",
        *_table(
            ("trained", "d", "scalars", "batch", "codec", "cosine", "√(K/d)", "longest rows"),
            [r for r in part["first_order"] if r["codec"] != "float"],
            lambda r: (
                MODELS[r["trainable"]],
                f"{r['dimension']:,}",
                f"{r['scalars']:,}",
                str(r["batch_size"]),
                r["codec"],
                _pm(r["cosine"]),
                f"{r['theory']:.3f}",
                _pm(r["largest_rows"]),
            ),
        ),
        "",
        "![recovery against scalars](privacy_audit.png)",
    ]


def _a2(part: Row) -> list[str]:
    first = [r for r in part["minilm"] if _best(r)]
    wanted = (64, 256, 1024, 4096)
    small = [r for r in part["small"] if r["codec"] != "float" and _best(r)]
    return [
        "## A2: which words are told",
        "",
        "MiniLM, first-order sketches: share of a batch's different tokens that are found; the",
        "attacker is told their number, and looks among the tokens of other sentences.",
        "",
        *_table(
            ("trained", "scalars", "batch", "tokens", "codec", "method", "found", "chance"),
            first,
            lambda r: (
                MODELS[r["trainable"]],
                f"{r['scalars']:,}",
                str(r["batch_size"]),
                f"{r['tokens'][0]:.0f}",
                r["codec"],
                r["method"],
                _pm(r["recall"]),
                f"{r['chance']:.3f}",
            ),
        ),
        "",
        "A small embedding of 500 words and 16 columns, d = 8,000, SPSA scalars. In the pool of",
        "4,096 each word's row lies on another's, and either fits: these attacks then take the",
        "longer, or the commoner word.",
        "",
        *_table(
            ("pool", "batch", "words", "codec", "method", *(f"K = {n:,}" for n in wanted)),
            [r for r in small if r["scalars"] == wanted[0]],
            lambda r: (
                f"{r['pool']:,}",
                str(r["batch_size"]),
                f"{r['tokens'][0]:.0f}",
                r["codec"],
                r["method"],
                *(_pm(_like(small, r, scalars=n)["recall"]) for n in wanted),
            ),
        ),
    ]


def _best(row: Row) -> bool:
    return bool(
        row["method"] == ("back projection" if row["codec"] == "sign" else "matching pursuit")
    )


def _a3(part: Row) -> list[str]:
    zeroth, first = part["zeroth_order"], part["first_order"]
    counts = sorted({r["scalars"] for r in zeroth})
    return [
        "## A3: which of 600 sentences was measured",
        "",
        "Batches of one, MiniLM's last layer; share that is named (chance .0017).",
        "",
        *_table(
            ("codec", *(f"{n} SPSA scalar{'s' * (n > 1)}" for n in counts), "sketch of 4,096"),
            [r for r in first if "noise" not in r["codec"]],
            lambda r: (
                r["codec"],
                *(_pm(_like(zeroth, {"codec": r["codec"]}, scalars=n)["named"]) for n in counts),
                _pm(r["named"]),
            ),
        ),
        "",
        "The sketch with the noise of private runs: "
        + "; ".join(
            f"{r['codec'].removeprefix('noise, ')}: {_pm(r['named'])}"
            for r in first
            if "noise" in r["codec"]
        )
        + ".",
    ]


def _a4(part: Row) -> list[str]:
    batch, agreement = part["batch"], part["agreement"]
    plain = [r for r in batch if r["noise"] == "none"]
    counts = sorted({r["scalars"] for r in plain if r["scalars"] > 1})
    return [
        "## A4: whether a sentence was in the batch",
        "",
        "MiniLM's last layer; area under the curve (.5 is a guess), 500 sentences known.",
        "",
        *_table(
            ("batch", "codec", *(f"{n:,} scalars" for n in counts)),
            [r for r in plain if r["scalars"] == counts[0]],
            lambda r: (
                str(r["batch_size"]),
                r["codec"],
                *(_pm(_like(plain, r, scalars=n)["auc"]) for n in counts),
            ),
        ),
        "",
        "With the noise of private runs of 1,000 rounds, sample rate .01; limit: the most that any",
        "attacker has who knows the rest of the batch.",
        "",
        *_table(
            ("noise", "multiplier", "batch", "scalars", "AUC", "limit"),
            [r for r in batch if r["noise"] != "none"],
            lambda r: (
                r["noise"],
                f"{r['multiplier']:.3f}",
                str(r["batch_size"]),
                f"{r['scalars']:,}",
                _pm(r["auc"]),
                f"{r['limit']:.3f}",
            ),
        ),
        "",
        "Whether it is in the data, by a whole run of 100 rounds of 64 scalars, 160 sentences,",
        "sample rate .1: "
        + "; ".join(f"{_noise(r['noise'])} {_pm(r['auc'])}" for r in part["run"])
        + ".",
        "",
        f"Vectors of backward passes, one a sentence; a worker's batch differs by "
        f"{agreement['backward']:g}, SPSA scalars by {agreement['spsa']:g} (relative).",
        "",
        "![membership and epsilon](privacy_audit_noise.png)",
    ]


def _noise(name: str) -> str:
    return "no noise" if name == "none" else name


def _a5(part: Row) -> list[str]:
    return [
        "## A5: whether the noise holds",
        "",
        "Lower bounds on the epsilon of one release at δ = 1e-5, 95 % confidence, from releases",
        "with and without a record of eight clip bounds; flagged: the bound is above the theory.",
        "Fewer releases prove less: those of 16 scalars are a quarter as many.",
        "",
        *_table(
            ("mechanism", "multiplier", "scalars", "releases", "theory", "bound", "share", "flag"),
            [*part["mechanism"], *part["long"]],
            lambda r: (
                FAMILIES[r["kind"]],
                f"{r['multiplier']:g}",
                str(r["scalars"]),
                *_verdict(r),
            ),
        ),
        "",
        "A whole round of a private worker (`Noised.measure`: Poisson sample with rate .5, own",
        "passes, clip, noise) on MiniLM's head, four scalars.",
        "",
        *_table(
            ("other examples", "multiplier", "rounds", "theory", "bound", "share", "flag"),
            part["round"],
            lambda r: (str(r["others"]), f"{r['multiplier']:g}", *_verdict(r)),
        ),
    ]


def _verdict(row: Row) -> tuple[str, ...]:
    theory = f"{row['epsilon']:.3f}"
    flag = "**flagged**" if row["flagged"] else ""
    return f"{row['releases']:,}", theory, str(row["bound"]), str(row["share"]), flag


def _r(part: Row) -> list[str]:
    return [
        "## R: ReCIT's malicious base, and gradients that are solved for",
        "",
        *_table(
            ("the run's base", "the worker's answer"),
            part["malicious_base"],
            lambda r: (r["base"], _answer(r["refused"])),
        ),
        "",
        "MiniLM's head, d = 770, from 4,096 scalars of one sentence: cosine of the features, share",
        "with a cosine above .99, labels right, and texts named among 600 by their features.",
        "",
        *_table(
            ("codec", "cosine", "above .99", "label", "text"),
            part["solved"],
            lambda r: (
                r["codec"],
                _pm(r["features_cosine"]),
                _pm(r["features_recovered"]),
                _pm(r["label"]),
                _pm(r["text_among_600"]),
            ),
        ),
    ]


def _answer(refused: str) -> str:
    return "takes part" if refused == "no" else f"refuses: “{refused} … not the run's”"


def _table(
    head: Sequence[str], rows: Sequence[Row], cells: Callable[[Row], Sequence[str]]
) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(cells(row)) + " |" for row in rows]


def _pm(pair: Sequence[float]) -> str:
    return f"{pair[0]:.3f} ± {pair[1]:.3f}"


def _like(rows: Sequence[Row], row: Row, **others: Any) -> Row:
    """Return the row that is as this one in what names it, but for `others`."""
    names = ("batch_size", "codec", "method", "pool", "noise")
    wanted = {key: row[key] for key in names if key in row} | others
    return next(r for r in rows if wanted.items() <= r.items())


def _origin(parts: Parts) -> str:
    made = [part["provenance"] for part in parts.values()]
    names = [f"{key} {', '.join(sorted({m[key] for m in made}))}" for key in made[0]]
    minutes = sum(part["cpu_s"] for part in parts.values()) / 60
    seeds = ", ".join(sorted({str(part["seeds"]) for part in parts.values()}))
    head = f"One thread, {minutes:.0f} minutes of it, {seeds} seeds from 0"
    return "; ".join([head, *names]) + "."


# -- plots ---------------------------------------------------------------------------------------


def plot(path: Path, parts: Parts) -> None:
    """Draw recovery, and noise."""
    plots.draw(path.with_suffix(".png"), [[_errors(parts["A1"]), _words(parts["A2"])]])
    noise = path.with_name(f"{path.stem}_noise.png")
    plots.draw(noise, [[_membership(parts["A4"]), _epsilons(parts["A5"])]])


def _curve(label: str, rows: Sequence[Row], key: str, across: str = "scalars") -> Curve:
    pairs = [row[key] for row in rows]
    return Curve(label, [r[across] for r in rows], [p[0] for p in pairs], [p[1] for p in pairs])


def _errors(part: Row) -> Panel:
    rows = [r for r in part["zeroth_order"] if r["batch_size"] == 1]
    float_, sign = ([r for r in rows if r["codec"] == name] for name in ("int8", "sign"))
    theory = Curve(
        "independent, theory",
        [r["scalars"] for r in float_],
        [r["theory"] for r in float_],
        [0.0 for _ in float_],
    )
    curves = [
        theory,
        _curve("int8", float_, "error"),
        _curve("int8, row known", float_, "error_structure_known"),
        _curve("one bit, row known", sign, "error_structure_known"),
    ]
    return Panel("gradient of a head, d = 770", "scalars", "relative error", curves)


def _words(part: Row) -> Panel:
    rows = [r for r in part["small"] if r["pool"] > r["dimension"] and _best(r)]
    curves = [
        _curve(f"{name}, batch of {size}", found, "recall")
        for codec, name in (("int8", "int8"), ("sign", "one bit"))
        for size in (1, 8)
        if (found := [r for r in rows if r["codec"] == codec and r["batch_size"] == size])
    ]
    return Panel("words of 500, embedding, d = 8,000", "scalars", "share found", curves)


def _membership(part: Row) -> Panel:
    rows = [r for r in part["batch"] if r["noise"] == "none" and r["scalars"] > 1]
    curves = [
        _curve(f"{name}, batch of {size}", found, "auc")
        for codec, name in (("int8", "int8"), ("sign", "one bit"))
        for size in (4, 16, 64)
        if (found := [r for r in rows if r["codec"] == codec and r["batch_size"] == size])
    ]
    return Panel("in the batch? no noise", "scalars", "area under the curve", curves, level=0.5)


def _epsilons(part: Row) -> Panel:
    sound = part["long"]
    half = [r for r in part["mechanism"] if r["kind"] == "HalfNoise" and r["scalars"] == 1]
    x = [r["multiplier"] for r in sound]
    none = [0.0 for _ in sound]
    curves = [
        Curve("theory", x, [r["epsilon"] for r in sound], none),
        Curve("bound", x, [r["bound"] for r in sound], none),
        Curve("bound, half noise", x, [r["bound"] for r in half], none),
    ]
    return Panel("epsilon of a release", "noise multiplier", "epsilon, δ = 1e-5", curves)
