"""Rows of results: repeated at every budget, as differences from a method, as a table."""

import math
from statistics import mean, stdev

from benchmarks.methods import METHODS, has_budget, split


def at_every_budget(rows: list[dict]) -> list[dict]:
    """The full cache has no budget, nor have some methods: they were run once, and are the same at
    all of them."""
    without = {name for name in METHODS if not has_budget(name)}
    others = [row for row in rows if split(row["method"])[0] not in without]
    budgets = sorted({row["budget"] for row in others or rows})
    once = {(row["task"], row["index"], row["method"]): row for row in rows
            if split(row["method"])[0] in without}
    return [row | {"budget": budget} for row in once.values() for budget in budgets] + others


def differences(rows: list[dict], reference: str) -> list[dict]:
    """Each score less that of the method `reference`, for the same prompt and budget."""
    known = {(r["task"], r["index"], r["budget"]): r["score"] for r in rows
             if r["method"] == reference}
    return [r | {"score": r["score"] - known[r["task"], r["index"], r["budget"]]} for r in rows
            if (r["task"], r["index"], r["budget"]) in known]


def table(rows: list[dict], percent: bool, above_full: bool = False) -> str:
    """Markdown: a line for every method, a column for every task and budget; mean ± its error.
    The rows are those of `at_every_budget`.

    The last columns are the mean of all prompts, or with `above_full` the difference from the full
    cache.
    """
    cells = {}
    named = [("needle" if r["task"].startswith("needle ") else r["task"], r) for r in rows]
    overall = ("mean",) if percent and len({task for task, _ in named}) > 1 else ()
    if above_full:
        named += [("above full", r) for r in differences(rows, "full")]
    for task, row in named:
        for column in (task, *overall):
            cells.setdefault((row["method"], column, row["budget"]), []).append(row["score"])
    scale, form = (100, "{:.0f}") if percent else (1, "{:.3f}")

    def cell(method, task, budget):
        scores = cells.get((method, task, budget))
        if not scores:
            return ""
        error = scale * stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
        text = form.format(scale * mean(scores))
        return f"{text} ± {form.format(error)}" if error is not None else text

    columns, last = {(t, b) for _, t, b in cells}, ("mean", "above full")
    columns = sorted(columns, key=lambda c: (c[0] in last, c[0], c[1]))
    lines = ["| method | " + " | ".join(f"{t} {b}" for t, b in columns) + " |",
             "|---" * (len(columns) + 1) + "|"]
    for method in dict.fromkeys(m for m, _, _ in cells):
        lines.append(f"| {method} | " + " | ".join(cell(method, *c) for c in columns) + " |")
    return "\n".join(lines)
