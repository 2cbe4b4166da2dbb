"""Write docs/kernels.svg and the table in docs/kernels.md from benchmarks/results/kernels.json.

Command: python -m benchmarks.report
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "kernels.json"
PAGE = ROOT / "docs" / "kernels.md"
PLOT = ROOT / "docs" / "kernels.svg"
BEGIN, END = "<!-- table: python -m benchmarks.report -->", "<!-- end of table -->"
OURS, PEERS = "#1b6f6a", "#b9bec4"


def bars(times: dict[str, float]) -> list[tuple[str, float, float]]:
    """Return label, peers' and our nanoseconds a weight of each operation."""
    apply = times["peer_apply64_f32"]
    return [
        ("one direction, float32", times["peer_f32"], times["perturb_f32"]),
        ("one direction, bfloat16", times["peer_bf16"], times["perturb_bf16"]),
        ("a round of 64 scalars", apply, times["apply64_f32"]),
        ("64 independent seeds", apply, times["independent64_f32"]),
        ("rebuild from 4,096 scalars", 64 * apply, times["rebuild_f32_k4096"]),
        ("rebuild from 1,048,576", 2**14 * apply, times["rebuild_f32_k1048576"]),
    ]


def draw(result: dict[str, Any]) -> Figure:
    """Return the plot: nanoseconds a weight on a log scale, and the memory's limit."""
    mpl.rcParams["svg.hashsalt"] = "lorand"
    mpl.rcParams["font.size"] = 9
    times = result["minilm_22m"]["ns_a_weight"]
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes: Axes = figure.subplots()
    rows = bars(times)
    for place, (_, theirs, ours) in enumerate(rows):
        for offset, value, colour in ((-0.2, theirs, PEERS), (0.2, ours, OURS)):
            axes.barh(place + offset, value, 0.38, color=colour)
            axes.text(value * 1.15, place + offset, _short(value), va="center", fontsize=8)
    limit = min(times["limit_f32"], times["torch_f32"])
    axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.text(
        limit * 1.1, len(rows) - 0.42, "memory: read and write in place (float32)", fontsize=8
    )
    axes.set_xscale("log")
    axes.set_xlim(0.05, max(row[1] for row in rows) * 12)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylim(len(rows) - 0.2, -0.6)
    axes.set_xlabel("nanoseconds a weight (log scale; shorter is better)")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [mpl.patches.Patch(color=c) for c in (PEERS, OURS)]
    labels = ["peers: seed, draw, add (4,096 and more extrapolated from 64)", "LoRand"]
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _short(value: float) -> str:
    if value >= 1e4:
        return f"{value / 1e3:,.0f} µs"
    return f"{value:,.0f} ns" if value >= 10 else f"{value:.2g} ns"


def table(result: dict[str, Any]) -> str:
    """Return the ratios as Markdown, all threads and one."""
    settings = [(f"{result['threads']} threads", result)]
    if "one_thread" in result:
        settings.append(("1 thread", result["one_thread"]))
    lines = ["| | " + " | ".join(word for word, _ in settings) + " |", "|---" * 3 + "|"]
    lines[1] = "|---" * (len(settings) + 1) + "|"
    for label, key, form in ROWS:
        lines.append(f"| {label} | " + " | ".join(form.format(r[key]) for _, r in settings) + " |")
    provenance = result["provenance"]
    lines += [
        "",
        f"{provenance['cpu']}; torch {provenance['torch']}, numba {provenance['numba']}; ",
    ]
    lines[-1] += f"commit {provenance['commit']}, {provenance['date']}."
    return "\n".join(lines)


TIMES, SHARE, PERCENT = "{:,.0f} × faster", "{:.2f} ×", "{:+.1%}"
ROWS = [
    ("perturb float32, against peers", "perturb_f32_vs_peer", TIMES),
    ("perturb bfloat16, against peers", "perturb_bf16_vs_peer", TIMES),
    ("apply 64 scalars, against peers", "apply64_vs_peer", TIMES),
    ("rebuild from 4,096 scalars, against peers", "rebuild4096_vs_peer", TIMES),
    ("64 independent seeds a pass, against peers", "independent64_vs_peer", TIMES),
    ("perturb float32, against the limit", "perturb_f32_vs_limit", SHARE),
    ("perturb bfloat16, against the limit", "perturb_bf16_vs_limit", SHARE),
    ("perturb float32 out of place, against a copy", "perturb_f32_out_of_place_vs_copy", SHARE),
    ("perturb bfloat16 out of place, against a copy", "perturb_bf16_out_of_place_vs_copy", SHARE),
    ("rebuild float32, K = 4,096, against the limit", "rebuild_f32_vs_limit", SHARE),
    ("rebuild bfloat16, K = 4,096, against the limit", "rebuild_bf16_vs_limit", SHARE),
    ("rebuild float32, K = 65,536", "rebuild_f32_k65536_vs_limit", SHARE),
    ("rebuild float32, K = 1,048,576", "rebuild_f32_k1048576_vs_limit", SHARE),
    ("project, K = 4,096, against the limit", "project_vs_limit", SHARE),
    ("project, K = 65,536", "project_k65536_vs_limit", SHARE),
    ("zeroth-order step over two forward passes, 128 tokens", "zo_step_overhead", PERCENT),
    ("… 32 tokens", "zo_step_overhead_length32", PERCENT),
]


def main() -> None:
    """Write both."""
    result = json.loads(RESULTS.read_text())
    draw(result).savefig(PLOT, metadata={"Date": None})
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{after}")


if __name__ == "__main__":
    main()
