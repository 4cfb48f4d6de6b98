"""One table and one picture of all methods: `python -m benchmarks.quality leaderboard`.

The rows are those of `results/leaderboard_*.jsonl`: RULER's files, needles in a book, and reading
on. The table goes between its two marks in `benchmarks/README.md`, the picture beside the rows.
"""

import json
import math
from pathlib import Path
from statistics import mean, stdev

from matplotlib import pyplot

from benchmarks import methods, plots
from benchmarks.rows import at_every_budget, differences

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"
BEGIN, END = "<!-- leaderboard -->\n", "<!-- end of leaderboard -->\n"
RULER = ("niah_single_1", "niah_multikey_2", "vt", "qa_1")
COLUMNS = {"RULER": RULER, "single": ("single",), "multikey": ("multikey",)}
FAMILIES = {  # in the order of the package: how it looks in the picture
    "evict_prompt": ("evict after the prompt", plots.GREY, "v"),
    "evict_writing": ("evict while writing", plots.BROWN, "^"),
    "retrieve": ("retrieve", plots.VIOLET, "h"),
    "budgets": ("budgets", plots.PINK, "D"),
    "channels": ("channels and bits", plots.ORANGE, "s"),
    "precision": ("channels and bits", plots.ORANGE, "s"),
    "merge": ("merge", plots.WINE, "P"),
    "layers": ("layers", plots.WINE, "P"),
    "estimate": ("estimate", plots.VERMILION, "X"),
    "cache": ("SentenceKV", plots.BLUE, "o"),
}
CEILINGS = ("full", "best_sentences", "best_tokens")  # they read every key


def read_rows() -> list[dict]:
    """Of all measurements. ValueError if there are none."""
    files = sorted(RESULTS.glob("leaderboard_*.jsonl"))
    rows = [json.loads(line) for file in files
            for line in file.read_text(encoding="utf-8").splitlines()]
    if not rows:
        raise ValueError(f"{RESULTS} has no leaderboard_*.jsonl: benchmarks/README.md has the"
                         " commands that make them")
    return rows


def with_error(scores: list, scale: float, form: str) -> str:
    if not scores:
        return ""
    text = form.format(scale * mean(scores))
    if len(scores) > 1:
        text += f" ± {form.format(scale * stdev(scores) / math.sqrt(len(scores)))}"
    return text


def table(rows: list[dict]) -> str:
    """A line a method, in the order of the package; a column a task and budget."""
    rows = at_every_budget(rows)
    budgets = sorted({row["budget"] for row in rows})
    above = differences([row for row in rows if row["task"].startswith("nll ")], "full")
    headings = [*COLUMNS, "loss above full"]
    titles = [f"{heading} {budget}" for heading in headings for budget in budgets]
    titles += [f"held {budget}" for budget in budgets]
    titles += [f"elsewhere {budgets[-1]}", f"read {budgets[-1]}"]
    lines = ["| method | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for method in sorted({row["method"] for row in rows}, key=order):
        cells = []
        for heading in headings:
            for budget in budgets:
                percent = heading in COLUMNS
                source = [r for r in rows if r["task"] in COLUMNS[heading]] if percent else above
                scores = [r["score"] for r in source
                          if r["method"] == method and r["budget"] == budget]
                cells.append(with_error(scores, 100 if percent else 1, "{:.0f}" if percent
                                        else "{:.3f}"))
        cells += [bytes_of(rows, method, budget, "held") for budget in budgets]
        cells += [bytes_of(rows, method, budgets[-1], name) for name in ("elsewhere", "read")]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def order(method: str) -> tuple:
    name = methods.split(method)[0]
    place = methods.METHODS.index(name) if name in methods.METHODS else len(methods.METHODS)
    return place, method


def bytes_of(rows: list[dict], method: str, budget: int, name: str) -> str:
    values = [row[name] for row in rows if row["method"] == method and row["budget"] == budget]
    return f"{mean(values):,.0f}" if values else ""


def points(rows: list[dict]) -> dict:
    """Of each method with all prompts: (tokens held, per cent answered) at each budget."""
    answered = [row for row in at_every_budget(rows) if not row["task"].startswith("nll ")]
    most = max(len(group) for group in grouped(answered).values())
    found = {}
    for (method, _), group in sorted(grouped(answered).items()):
        if len(group) == most:
            point = mean(r["held"] for r in group), 100 * mean(r["score"] for r in group)
            found.setdefault(method, []).append(point)
    return {method: sorted(set(at)) for method, at in found.items()}


def grouped(rows: list[dict]) -> dict:
    groups = {}
    for row in rows:
        groups.setdefault((row["method"], row["budget"]), []).append(row)
    return groups


def front(points: list[tuple]) -> list[tuple]:
    """Those that no other beats with fewer tokens, from the left.

    >>> front([(100, 0.5), (200, 0.4), (150, 0.7)])
    [(100, 0.5), (150, 0.7)]
    """
    kept = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept


def family(method: str) -> str:
    return methods.class_of(methods.split(method)[0]).__module__.rpartition(".")[2]


def draw(rows: list[dict], path: Path):
    """Answers against what is held. A line joins the budgets of a method; the step line is the
    front of those that do not read every key."""
    figure, axis = pyplot.subplots(figsize=(10, 9), layout="constrained")
    found, ends = points(rows), []
    rivals = {m: at for m, at in found.items() if m not in CEILINGS}
    best = front([point for at in rivals.values() for point in at])
    axis.step(*zip(*best), where="post", color="black", linewidth=1, zorder=1)
    for method, at in found.items():
        name, colour, marker = ("reads every key", "black", "*")
        if method not in CEILINGS:
            name, colour, marker = FAMILIES.get(family(method), FAMILIES["cache"])
        known = [text.get_label() for text in axis.lines]
        look = {"color": colour, "marker": marker, "markersize": 8 if method in plots.OURS else 5}
        axis.plot(*zip(*at), linewidth=0.6, label=None if name in known else name, **look)
        ends.append((*at[-1], look | {"markersize": 5}, plots.style(method)[0],
                     plots.weight(method)))
    axis.set_xscale("log")
    axis.set_xticks([100, 200, 500, 1000, 2000, 4000], ["100", "200", "500", "1,000", "2,000",
                                                       "4,000"])
    axis.minorticks_off()
    figure.legend(fontsize=9, loc="outside upper center", ncols=5, frameon=False)
    plots.label_ends(axis, ends, room=len(ends) + 1, size=8)
    plots.finish(axis, "held for attention, tokens of 16 bits a KV head",
                 "prompts answered, per cent")
    plots.save(figure, path)


def make(readme: Path = README) -> str:
    """Draw the picture, put the table into `readme`, and return it."""
    rows = read_rows()
    made = table(rows)
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{readme} has no lines {BEGIN.strip()} and {END.strip()}")
    readme.write_text(f"{before}{BEGIN}{made}{END}{after}", encoding="utf-8")
    draw(rows, RESULTS / "leaderboard.png")
    return made
