"""The pictures of what was measured: `python -m benchmarks.pictures` draws all of them again.

The colours are told apart by the colour-blind as well.
"""

import sys
from io import BytesIO
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from PIL import Image

from benchmarks import with_status
from benchmarks.methods import KNOWN, class_of, split
from benchmarks.rows import FOLDER, error_of, read
from benchmarks.tables import rows_of, values_of
from cache import SentenceKVCache

BLUE, ORANGE, VERMILION, PINK, WINE, VIOLET, BROWN, GREY = (
    "#0072b2", "#c78500", "#d55e00", "#bf5f95", "#882255", "#7a68b8", "#8c6d46", "#757575")
FAMILIES = {  # module of `benchmarks.methods`: what its methods do, and their colour
    "evict_prompt": ("evict after the prompt", GREY),
    "evict_writing": ("evict while writing", BROWN), "retrieve": ("retrieve", VIOLET),
    "budgets": ("unequal budgets", PINK), "channels": ("channels and bits", ORANGE),
    "precision": ("channels and bits", ORANGE), "merge": ("merge, share layers", WINE),
    "layers": ("merge, share layers", WINE), "estimate": ("estimate", VERMILION)}
EVERY_KEY = ("full", "best_sentences", "best_tokens")  # they read every key
LOOKS = {  # method: colour, marker, line; others are SentenceKV's
    "full": ("black", "o", "-"), "best_tokens": ("black", "P", "-."),
    "published": (ORANGE, "s", "-"), "shadowkv": (BROWN, "^", "--"),
    "sentencekv:kv_bits=16": (ORANGE, "s", "-"), "sentencekv:query_decay=0": (VIOLET, "d", "--"),
    "sentencekv, compiled": (BLUE, "s", "--"), "sentencekv, graph": (BLUE, "d", "--"),
    "transformers": (VERMILION, "X", "-"), "llama.cpp bfloat16": (BROWN, "^", "-"),
    "llama.cpp float32": (BROWN, "^", "-"), "llama.cpp 4-bit": (BROWN, "^", "--")}
pyplot.rcParams.update({
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e6e6e6", "legend.frameon": False,
    "legend.fontsize": 8.5, "figure.titlesize": 10, "figure.constrained_layout.use": True})


def label(method: str) -> str:
    name, settings = split(method)
    known = KNOWN[name].label if name in KNOWN else name
    return f"{known}, {settings}" if settings else known


def family(method: str) -> tuple[str, str]:
    """What a method does, and its colour."""
    kind = class_of(method)
    if method in EVERY_KEY or issubclass(kind, SentenceKVCache):
        return ("reads every key", "black") if method in EVERY_KEY else ("SentenceKV", BLUE)
    return FAMILIES[kind.__module__.rpartition(".")[2]]


def ranked(panels: dict, path: Path):
    """A line for every method, the best in the first panel on top: points with standard errors.
    `panels`: title -> method -> values."""
    first = next(iter(panels.values()))
    methods = sorted(first, key=lambda method: mean(first[method]))
    figure, axes = pyplot.subplots(1, len(panels), sharey=True,
                                   figsize=(3.3 * len(panels) + 2, 0.24 * len(methods) + 1.4))
    for axis, (title, found) in zip(axes, panels.items()):
        for y, method in enumerate(methods):
            if method in found:
                words, colour = family(method)
                axis.errorbar(mean(found[method]), y, xerr=error_of(found[method]), fmt="o",
                              color=colour, markersize=4, elinewidth=1, label=words)
        axis.set_xlabel(title)
    axes[0].set_yticks(range(len(methods)), [label(method) for method in methods], fontsize=8.5)
    axes[0].margins(y=0.02)
    for tick, method in zip(axes[0].get_yticklabels(), methods):
        tick.set_color(family(method)[1])
        tick.set_fontweight("bold" if method == "sentencekv_16bit" else "normal")
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=5)
    save(figure, path)


def lines(panels: dict, path: Path, ticks: list | None = None, title: str = ""):
    """`panels`: (x label, y label) -> line -> x -> values; a line is a method, or "floor of" one.
    The means, with standard errors."""
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.4), squeeze=False)
    for axis, ((x_label, y_label), found) in zip(axes[0], panels.items()):
        for name, points in found.items():
            method = name.removeprefix("floor of ")
            colour, marker, line = LOOKS.get(method, (BLUE, "o", "-"))
            axis.errorbar(list(points), [mean(values) for values in points.values()],
                          [error_of(values) for values in points.values()], color=colour,
                          marker="" if name != method else marker, elinewidth=0.8,
                          linestyle=":" if name != method else line,
                          label=name.replace(method, label(method)),
                          linewidth=2.4 if name == "sentencekv" else 1.4)
        if ticks:
            axis.set_xscale("log")
            axis.set_xticks(ticks, map(str, ticks))
            axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)  # covers no line
    figure.suptitle(title)
    save(figure, path)


def ms_by_length(about: dict, rows: list[dict], path: Path):
    """With the floors of the full cache and of SentenceKV."""
    found = {row["method"]: {} for row in rows}
    for row in rows:
        found[row["method"]][row["length"]] = [row["decode_ms_per_token"]]
        if row["method"] in ("full", "sentencekv"):
            floors = found.setdefault(f"floor of {row['method']}", {})
            floors[row["length"]] = [row["floor_ms"]]
    lines({("tokens in the prompt", "ms a token"): found}, path,
          title="{model}, {dtype}, {machine}".format(**about))


def save(figure, path: Path):
    """With a palette of 96 colours, which makes the file a third of its size."""
    data = BytesIO()
    figure.savefig(data, dpi=130, facecolor="white")
    pyplot.close(figure)
    Image.open(data).convert("RGB").quantize(96).save(path, optimize=True)


def leaderboard(path: Path):
    answered = [row for name in ("leaderboard_ruler", "leaderboard_needles")
                for row in rows_of(name) if row["budget"] == 256]
    losses = values_of("leaderboard_reading", "loss", 256)
    percent, device = (
        {method: [100 * row[of] for row in answered if row["method"] == method]
         for method in losses} for of in ("score", "device"))
    ranked({"prompts answered, per cent": percent, "loss above the full cache's": losses,
            "bytes on the device, per cent": device}, path)


def quality(path: Path):
    """Needles and loss by budget."""
    shown = ("full", "sentencekv_16bit", "published", "shadowkv", "best_tokens")
    budgets, panels = (96, 192, 256, 512), {}
    for y_label, file, of, scale in (("needles found, per cent", "budgets_needles", "percent", 100),
                                     ("loss above the full cache's", "budgets_reading", "loss", 1)):
        values = {budget: values_of(file, of, budget) for budget in budgets}
        panels["token budget", y_label] = {
            method: {budget: [scale * value for value in values[budget][method]]
                     for budget in budgets} for method in shown}
    lines(panels, path, budgets)


def equal_bytes(path: Path):
    """Loss by bytes, for both models."""
    panels = {}
    for model in ("smollm2", "qwen2.5"):
        found = {"sentencekv": {}, "sentencekv:kv_bits=16": {}, "sentencekv:query_decay=0": {}}
        for budget in (64, 128, 320, 832):
            shares, losses = (values_of(f"bytes_reading_{model}", of, budget)
                              for of in ("device", "loss"))
            for method, points in found.items():
                points[100 * mean(shares[method])] = losses[method]
        panels["bytes on the device, per cent of the full cache",
               f"loss above the full cache's, {model}"] = found
    lines(panels, path, [5, 10, 20, 40])


@with_status
def main(arguments=None):
    """Draw every picture of benchmarks/README.md and of the lessons."""
    for draw in (leaderboard, quality, equal_bytes):
        draw(FOLDER / f"{draw.__name__}.png")
    times = FOLDER / "speed_cpu_bfloat16.jsonl"
    ms_by_length(*read(times), times.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
