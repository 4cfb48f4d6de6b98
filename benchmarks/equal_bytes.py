"""Quality at equal bytes on the device: `python -m benchmarks.equal_bytes MODEL=ROWS.jsonl ...`

ROWS are those of `benchmarks.quality perplexity` for settings of SentenceKV at several budgets.
What each must have on the device to write a token is counted as in bfloat16: slots, and for each
sentence its place in the table. A loss at a share of the full cache is interpolated between two
budgets, in the logarithm of the bytes. A table is printed, and written beside the first file with a
picture. In brackets is the difference from `sentencekv:kv_bits=16`, passage by passage.
"""

import math
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib import pyplot

from benchmarks import plots
from benchmarks.leaderboard import with_error
from benchmarks.methods import settings_of
from benchmarks.methods.sentences import vectors_in_tokens
from benchmarks.rows import at_every_budget, differences
from benchmarks.tasks import read_rows
from cache import SentenceKVCache
from sentencekv import SentenceKVConfig
from weights.config import load_config
from weights.models import model_folder

SHARES = (0.05, 0.1, 0.175)
BEFORE = "sentencekv:kv_bits=16"  # what the others are compared with
PICTURE = {  # method: how it is called in the picture, and its colour
    "sentencekv": ("the default: 8 bits, limit 16, decay 0.9", plots.BLUE),
    BEFORE: ("16 bits", plots.ORANGE), "sentencekv:query_decay=0": ("decay 0", plots.VIOLET),
    "sentencekv:sentence_limit=32": ("limit 32", plots.BROWN)}


def device_share(row: dict, model_config) -> float:
    """Of the full cache. The table has no spare places here."""
    config = SentenceKVConfig(token_budget=row["budget"], **settings_of(row["method"]))
    cache = SentenceKVCache(config, model_config, 10**6, "meta", torch.bfloat16)
    layer = cache.layers[0]
    # A row says how many tokens the vectors are worth that are read in order to choose.
    n_places = 1 + round((row["read"] - row["held"]) / vectors_in_tokens(layer, 1))
    place = sum(getattr(layer, name)[:, :1].nbytes for name in layer.TABLE)
    slots = (layer.slots, layer.slot_row, layer.slot_place, layer.slot_missing)
    held = n_places * place + sum(x.nbytes for x in (*slots, *vars(layer.packing).values())
                                  if isinstance(x, torch.Tensor))
    n_tokens = row["index"] + row["new_tokens"] - 1
    return held / (n_tokens * 2 * layer.host.heads * layer.packing.dim * 2)


def interpolate(points: list[tuple], share: float) -> float:
    """The loss at a share, from points (share, loss) in rising order; NaN outside of them.

    >>> round(interpolate([(0.05, 3.0), (0.2, 1.0)], 0.1), 6)
    2.0
    """
    for (low, before), (high, after) in pairwise(points):
        if low <= share <= high:
            part = math.log(share / low) / math.log(high / low)
            return before + part * (after - before)
    return math.nan


def curves(rows: list[dict], model_config) -> dict:
    """method -> passage -> points (share, loss above the full cache), the smallest share first."""
    found = {}
    for row in differences(at_every_budget(rows), "full"):
        if row["method"] != "full":
            point = device_share(row, model_config), row["score"]
            found.setdefault(row["method"], {}).setdefault(row["task"], []).append(point)
    return {method: {task: sorted(points) for task, points in tasks.items()}
            for method, tasks in found.items()}


def cell(found: dict, method: str, share: float) -> str:
    """The mean loss, and in brackets by how much it differs from BEFORE, passage by passage."""
    losses = {name: {task: interpolate(points, share) for task, points in found[name].items()}
              for name in (method, BEFORE) if name in found}
    values = [loss for loss in losses[method].values() if not math.isnan(loss)]
    if len(values) < len(losses[method]):
        return ""
    text, before = with_error(values, 1, "{:.3f}"), losses.get(BEFORE, {})
    pairs = [loss - before[task] for task, loss in losses[method].items()
             if not math.isnan(before.get(task, math.nan))]
    return text if method == BEFORE or not pairs else f"{text} ({with_error(pairs, 1, '{:.3f}')})"


def table(models: dict) -> str:
    """`models`: name -> curves."""
    heads = [f"{name}, {100 * share:g} %" for name in models for share in SHARES]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for method in dict.fromkeys(method for found in models.values() for method in found):
        cells = [cell(found, method, share) if method in found else ""
                 for found in models.values() for share in SHARES]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(models: dict, path: Path):
    """Loss against bytes, a panel a model. Bars are standard errors."""
    figure, axes = pyplot.subplots(1, len(models), figsize=(6.2 * len(models), 4.4), sharey=True,
                                   squeeze=False, layout="constrained")
    for axis, (name, found) in zip(axes[0], models.items()):
        for method in filter(found.get, PICTURE):
            columns = list(zip(*found[method].values()))  # the points of a budget
            x = [mean(100 * share for share, _ in column) for column in columns]
            y = [mean(loss for _, loss in column) for column in columns]
            errors = [stdev(loss for _, loss in column) / math.sqrt(len(column))
                      if len(column) > 1 else 0 for column in columns]
            label, colour = PICTURE[method]
            axis.errorbar(x, y, errors, marker="o", color=colour, label=label, elinewidth=0.8,
                          linewidth=2.4 if method == "sentencekv" else 1.4)
        axis.set_xscale("log")
        axis.set_xticks([5, 10, 20, 40], ["5", "10", "20", "40"])
        axis.minorticks_off()
        axis.set_title(name, fontsize=11)
        plots.finish(axis, "bytes on the device, per cent of the full cache",
                     "loss above the full cache's")
        axis.set_ylim(bottom=0)
    axes[0][0].legend(frameon=False, fontsize=9)
    plots.save(figure, path)


def main(arguments: list[str]) -> int:
    try:
        models, files = {}, []
        for argument in arguments:
            name, equals, path = argument.partition("=")
            if not equals:
                raise ValueError(f"{argument!r} is not MODEL=ROWS.jsonl")
            files.append(Path(path))
            rows = [row for _, row in read_rows(files[-1], "task", "index", "method", "budget",
                                                "score", "held", "read", "new_tokens")]
            models[name] = curves(rows, load_config(model_folder(Path(name))))
        if not models:
            raise ValueError("needs MODEL=ROWS.jsonl")
        report = table(models)
        print(report)
        files[0].with_suffix(".md").write_text(report + "\n", encoding="utf-8")
        draw(models, files[0].with_suffix(".png"))
    except (ValueError, OSError) as error:
        print(f"benchmarks.equal_bytes: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
