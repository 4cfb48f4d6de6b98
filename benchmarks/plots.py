"""The pictures of what `benchmarks.quality` and `benchmarks.speed` measured.

    python -m benchmarks.plots needle benchmarks/results/needle.jsonl

draws a picture again, beside its rows: `needle`, `ruler`, `perplexity`, `sinks`, `speed` or
`scale`. `rows` are the lines of such a file, as dictionaries. The colours are told apart by the
colour-blind as well, and each method has its own marker and line.

    python -m benchmarks.plots quality benchmarks/results/{multikey,perplexity}.jsonl

draws needles and losses side by side, for a few methods.
"""

import json
import math
import sys
from io import BytesIO
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from PIL import Image

from benchmarks.rows import at_every_budget, differences

BLUE, ORANGE, VERMILION, PINK, WINE, VIOLET, BROWN, GREY = (
    "#0072b2", "#c78500", "#d55e00", "#bf5f95", "#882255", "#7a68b8", "#8c6d46", "#757575")
STYLES = {  # method: name in pictures, colour, marker, line
    "full": ("full cache", "black", "o", "-"),
    "streamingllm": ("StreamingLLM", GREY, "v", "-"),
    "l2norm": ("L2-norm", ORANGE, "s", "-"),
    "h2o": ("H2O", BROWN, "^", "-"),
    "snapkv": ("SnapKV", PINK, "D", "-"),
    "pyramidkv": ("PyramidKV", WINE, "P", "-"),
    "chunkkv": ("ChunkKV", VERMILION, "X", "-"),
    "expected_attention": ("Expected Attention", GREY, "d", "--"),
    "quest": ("Quest", VIOLET, "h", "-"),
    "quest_dense": ("Quest, 2 layers whole", VIOLET, "h", "--"),
    "shadowkv": ("ShadowKV's chunks", BROWN, "^", "--"),
    "windowkv": ("WindowKV", GREY, "v", "-"), "shotkv": ("ShotKV", GREY, "v", "-"),
    "morphkv": ("MorphKV", BROWN, "^", "-"), "corm": ("CORM", BROWN, "^", "-"),
    "cascading": ("Cascading KV", BROWN, "^", "-"), "arkvale": ("ArkVale", VIOLET, "h", "-"),
    "actqkv": ("ActQKV", VIOLET, "h", "-"), "clusterkv": ("ClusterKV", VIOLET, "h", "-"),
    "l2norm_dense": ("L2-norm, 2 layers whole", ORANGE, "s", "--"),
    "arkvale_dense": ("ArkVale, 2 layers whole", VIOLET, "h", "--"),
    "clusterkv_dense": ("ClusterKV, 2 layers whole", VIOLET, "h", "--"),
    "adakv": ("Ada-KV", PINK, "D", "-"), "prefixkv": ("PrefixKV", PINK, "D", "-"),
    "dbudgetkv": ("DBudgetKV", PINK, "D", "-"), "kvcompress": ("KV-Compress", PINK, "D", "-"),
    "duo_heads": ("DuoAttention's split, untrained", PINK, "D", "-"),
    "think": ("ThinK", ORANGE, "s", "-"), "snapkv_4bit": ("SnapKV at 4 bits", ORANGE, "s", "-"),
    "kvmerger": ("KVMerger", WINE, "P", "-"), "less": ("LESS, untrained", WINE, "P", "-"),
    "kvsharer": ("KVSharer", WINE, "P", "-"), "retroinfer": ("RetroInfer", VERMILION, "X", "-"),
    "last_query": ("SentenceKV, last query", BLUE, "o", ":"),
    "sentencekv_4bit": ("SentenceKV, 4 bits on the host", BLUE, "o", "--"),
    "two_level": ("SentenceKV, two levels", BLUE, "o", "-."),
    "boxes": ("SentenceKV, boxes of vectors", BLUE, "o", "-."),
    "published": ("SentenceKV as published, r = 2", ORANGE, "s", "-"),
    "published:keep_factor=3": ("SentenceKV as published, r = 3", ORANGE, "s", "--"),
    "published:keep_factor=inf": ("SentenceKV as published, r = ∞", ORANGE, "s", "-."),
    "sentencekv": ("SentenceKV, ours", BLUE, "o", "-"),
    "sentencekv_16bit": ("SentenceKV, ours, 16 bits", BLUE, "o", "-"),
    "plain": ("SentenceKV, Gaussian score alone", BLUE, "v", ":"),
    "two_vectors": ("two vectors a sentence", BLUE, "p", "--"),
    "two_bit_keys": ("2-bit keys", BLUE, "h", "--"),
    "sentencekv:score=mean_query": ("SentenceKV, paper's score", BLUE, "d", "--"),
    "sentencekv:score=mean_query,sink_tokens=32":
        ("SentenceKV, paper's score, 32 sinks", BLUE, "d", "-"),
    "sentencekv:sink_tokens=32": ("SentenceKV, 32 sinks", BLUE, "p", "--"),
    "sentencekv, graph": ("SentenceKV, CUDA graph", BLUE, "d", "--"),
    "sentencekv, compiled": ("SentenceKV, compiled", BLUE, "s", "--"),
    "sentencekv, compiled, graph": ("SentenceKV, compiled, CUDA graph", BLUE, "v", "--"),
    "best_sentences": ("best sentences", "black", "*", "--"),
    "best_tokens": ("best tokens", "black", "P", "-."),
    "transformers": ("transformers", VERMILION, "X", "-"),
    "llama.cpp bf16": ("llama.cpp, bfloat16", BROWN, "^", "-"),
    "llama.cpp 4-bit": ("llama.cpp, 4 bits", BROWN, "^", "--"),
}

OURS = ("sentencekv", "sentencekv_16bit")
SHOWN = ("full", *OURS, "published", "shadowkv", "best_tokens")  # in `quality`


def style(method: str) -> tuple:
    """Name, colour, marker and line; a method without a style is shown by its specification."""
    return STYLES.get(method, (method, GREY, ".", "--"))


def weight(method: str) -> str:
    return "bold" if method in OURS else "normal"


def unique(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def needle(rows: list[dict], path: Path):
    """A table for each budget: a row for each method, a column for each depth of the needle.

    A cell is the mean over all lengths of the prompt.
    """
    places = {row["task"]: tuple(map(float, row["task"].split()[1:])) for row in rows}
    lengths, depths = (sorted(set(values)) for values in zip(*places.values()))
    rows = [row | {"depth": places[row["task"]][1]} for row in at_every_budget(rows)]
    methods, budgets = unique(rows, "method"), sorted(unique(rows, "budget"))
    figure, axes = pyplot.subplots(
        1, len(budgets), sharey=True, squeeze=False, layout="constrained",
        figsize=(max(6, 2.6 + 0.33 * len(depths) * len(budgets)), 1.1 + 0.3 * len(methods)))
    for axis, budget in zip(axes[0], budgets):
        ours = [row for row in rows if row["budget"] == budget]
        heat_map(axis, [[per_cent(ours, method, depth) for depth in depths] for method in methods])
        axis.set_title(f"token budget {budget}", fontsize=10)
        axis.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=9)
    names = axes[0][0].set_yticks(range(len(methods)), [style(m)[0] for m in methods], fontsize=10)
    for tick, method in zip(names, methods):
        tick.label1.set_fontweight(weight(method))
    tokens = ", ".join(f"{length:,.0f}" for length in lengths)
    figure.suptitle(f"Needles found, per cent, in prompts of {tokens} tokens", fontsize=11)
    figure.supxlabel("depth of the needle: 0 is the start of the prompt, 1 its end", fontsize=10)
    save(figure, path)


def per_cent(rows: list[dict], method: str, depth: float) -> float:
    scores = [r["score"] for r in rows if r["method"] == method and r["depth"] == depth]
    return 100 * mean(scores) if scores else math.nan


def heat_map(axis, grid: list[list[float]]):
    """Cells from dark (0) to light (100), each with its number."""
    axis.imshow(grid, vmin=0, vmax=100, cmap="cividis", aspect="auto")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            axis.text(x, y, "" if math.isnan(value) else f"{value:.0f}", ha="center", va="center",
                      fontsize=8.5, color="black" if value > 50 else "white")
    axis.set_xticks([x - 0.5 for x in range(1, len(grid[0]))], minor=True)
    axis.set_yticks([y - 0.5 for y in range(1, len(grid))], minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)


def score_by_budget(rows: list[dict], path: Path):
    """The mean score of all rows, in per cent."""
    rows = at_every_budget(rows)
    by_budget([row | {"y": 100 * row["score"]} for row in rows], "mean score, per cent", path)


def loss_by_budget(rows: list[dict], path: Path):
    """By how much a text's mean NLL is above that of the full cache, the mean of all texts."""
    by_budget([row | {"y": row["score"]} for row in differences(at_every_budget(rows), "full")],
              "mean NLL above that of the full cache, nats a token", path)


def by_budget(rows: list[dict], label: str, path: Path):
    figure, axis = pyplot.subplots(figsize=(8.4, 5.4), layout="constrained")
    draw_by_budget(axis, rows, label)
    save(figure, path)


def quality(rows: list[dict], path: Path):
    """Needles found and loss, side by side, for the methods of SHOWN."""
    rows = at_every_budget([row for row in rows if row["method"] in SHOWN])
    losses = differences([row for row in rows if row["task"].startswith("nll ")], "full")
    found = [row for row in rows if not row["task"].startswith("nll ")]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    draw_by_budget(left, [row | {"y": 100 * row["score"]} for row in found],
                   "needles found, per cent")
    draw_by_budget(right, [row | {"y": row["score"]} for row in losses],
                   "reading on: mean NLL above that of the full cache")
    left.set_ylim(bottom=0)
    save(figure, path)


def draw_by_budget(axis, rows: list[dict], label: str):
    label_ends(axis, [draw_line(axis, method, *line, dotted=method == "full")
                      for method, line in lines(rows, "budget", "y").items()])
    budgets = sorted(unique(rows, "budget"))
    axis.set_xscale("log", base=2)
    axis.set_xticks(budgets, map(str, budgets))
    axis.minorticks_off()
    finish(axis, "token budget", label)


def sinks_by_layer(rows: list[dict], path: Path):
    """Above: how many secondary sinks a head has. Below: where the prompt's last tokens look."""
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8.4, 4.6),
                                             height_ratios=(2, 3), layout="constrained")
    by_kind = [row | {"kind": row["task"].split()[0]} for row in rows]
    layers = sorted(unique(rows, "index"))
    count, secondary, first = (
        [mean(r["score"] for r in by_kind if r["kind"] == kind and r["index"] == layer)
         for layer in layers] for kind in ("count", "secondary", "first"))
    above.bar(layers, count, color=BLUE)
    ends = []
    for values, name, colour, marker in ((secondary, "secondary sinks", BLUE, "s"),
                                         (first, "first 4 tokens", VERMILION, "o")):
        look = {"color": colour, "marker": marker, "markersize": 5}
        below.plot(layers, [100 * value for value in values], linewidth=1.5, **look)
        ends.append((layers[-1], 100 * values[-1], look, name, "normal"))
    label_ends(below, ends)
    finish(above, "", "number in a head")
    finish(below, "layer", "attention, per cent")
    save(figure, path)


def ms_by_length(rows: list[dict], path: Path):
    """Solid: measured. Dotted: the floor, where it is not that of a method drawn before."""
    figure, axis = pyplot.subplots(figsize=(8.4, 4.6), layout="constrained")
    ends = [draw_line(axis, method, *line)
            for method, line in lines(rows, "length", "decode_ms_per_token").items()]
    floors = lines([row for row in rows if row["floor_ms"]], "length", "floor_ms")
    for i, (method, line) in enumerate(floors.items()):
        if line not in list(floors.values())[:i]:
            ends.append(draw_line(axis, method, *line, dotted=True, prefix="floor, "))
    axis.set_ylim(bottom=0)
    label_ends(axis, ends)
    finish(axis, "tokens in the prompt", "ms a token")
    axis.set_title(f"{rows[0]['model']}, {rows[0]['dtype']}, {rows[0]['machine']}", fontsize=10)
    save(figure, path)


def stages_by_length(rows: list[dict], path: Path):
    """Solid: measured. Dotted: the time to move the stage's bytes once."""
    figure, axis = pyplot.subplots(figsize=(8.4, 4.6), layout="constrained")
    looks = (("score", BLUE, "o"), ("select", ORANGE, "s"), ("load", BROWN, "^"),
             ("attend", GREY, "v"), ("two levels", VERMILION, "X"))
    lengths, ends = [row["length"] for row in rows], []
    for stage, colour, marker in looks:
        values, look = [row[stage] for row in rows], {"color": colour, "marker": marker}
        axis.plot(lengths, values, linewidth=1.5, **look)
        ends.append((values[-1], stage, colour))
        if stage in rows[0]["bound_ms"]:
            axis.plot(lengths, [row["bound_ms"][stage] for row in rows], linestyle=":",
                      linewidth=1, color=colour)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{length // 1024:,}k" for length in lengths])
    axis.minorticks_off()
    low, high = map(math.log10, axis.get_ylim())
    ends = sorted((math.log10(y), words, colour) for y, words, colour in ends)
    places = spread([y for y, _, _ in ends], (high - low) / 22, low, high)
    for place, (_, words, colour) in zip(places, ends):
        axis.annotate(words, (lengths[-1], 10**place), (8, -3), textcoords="offset points",
                      fontsize=10, color=colour, annotation_clip=False)
    finish(axis, "tokens", "ms a token and layer")
    axis.set_title("one layer of 8 KV heads, {dtype}, {machine}".format(**rows[0]), fontsize=10)
    save(figure, path)


def lines(rows: list[dict], x: str, y: str) -> dict:
    """By method: the values of x, and the mean of y at each."""
    points = {}
    for row in rows:
        points.setdefault(row["method"], {}).setdefault(row[x], []).append(row[y])
    return {method: (sorted(at), [mean(at[value]) for value in sorted(at)])
            for method, at in points.items()}


def draw_line(axis, method: str, xs: list, ys: list, dotted=False, prefix="") -> tuple:
    """Returns where it ends, how it looks, and its label: x, y, look, words, weight."""
    name, colour, marker, line = style(method)
    thick = method in OURS and not dotted
    look = {"color": colour, "marker": "" if dotted else marker, "markersize": 8 if thick else 6}
    axis.plot(xs, ys, linestyle=":" if dotted else line, linewidth=3 if thick else 1.5,
              zorder=3 if thick else 2, **look)
    return xs[-1], ys[-1], look, prefix + name, "bold" if thick else "normal"


def label_ends(axis, ends: list[tuple], room: int = 22, size: int = 10):
    """To the right of the lines' ends their markers and names, one below the other. There is room
    for so many names in this font size."""
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom, top)  # labels do not change it
    ends = sorted((end for end in ends if math.isfinite(end[1])), key=lambda end: end[1])
    places = spread([y for _, y, *_ in ends], (top - bottom) / room, bottom, top)
    beside = axis.get_yaxis_transform()  # x in widths of the axes, y in data
    for (x, y, look, words, bold), place in zip(ends, places):
        axis.annotate("", (x, y), (1.07, place), textcoords=beside, annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": look["color"], "linewidth": 0.7,
                                  "shrinkA": 5 if look["marker"] else 0, "shrinkB": 6})
        axis.plot(1.07, place, transform=beside, clip_on=False, **look)
        axis.text(1.09, place, words, transform=beside, va="center", color=look["color"],
                  fontsize=size, fontweight=bold)


def spread(values: list[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to ascending values, at least `gap` apart and between `low` and `high`.

    >>> spread([1, 2, 9], 2, 0, 10)
    [0.5, 2.5, 9]
    """
    groups = []  # (place of value i less i gaps, how many values share it), ascending
    for i, value in enumerate(values):
        groups.append((value - i * gap, 1))
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (a, n), (b, m) = groups.pop(-2), groups.pop()
            groups.append(((a * n + b * m) / (n + m), n + m))
    places = [place for place, n in groups for _ in range(n)]
    high -= gap * (len(values) - 1)
    return [max(min(place, high), low) + i * gap for i, place in enumerate(places)]


def finish(axis, x_label: str, y_label: str):
    axis.set_xlabel(x_label, fontsize=10)
    axis.set_ylabel(y_label, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)


def save(figure, path: Path):
    """With a palette of 96 colours, which makes the file a third of its size."""
    data = BytesIO()
    figure.savefig(data, dpi=130, facecolor="white")
    pyplot.close(figure)
    Image.open(data).convert("RGB").quantize(96).save(path, optimize=True)


BY_TASK = {"needle": needle, "ruler": score_by_budget, "perplexity": loss_by_budget,
           "speed": ms_by_length, "scale": stages_by_length, "sinks": sinks_by_layer,
           "quality": quality}

if __name__ == "__main__":
    task, *files = sys.argv[1], *map(Path, sys.argv[2:])
    results = [json.loads(line) for file in files
               for line in file.read_text(encoding="utf-8").splitlines()]
    picture = files[0].with_name("quality.png") if len(files) > 1 else files[0].with_suffix(".png")
    BY_TASK[task](results, picture)
