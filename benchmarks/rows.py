"""Files of results, and tables of what is in them. No torch here.

The first line of a file says where its rows come from (`engine.provenance`). Each other line is
what one prompt gave, {"task", "index", ..., "results": [{"method", "budget", "score", ...}, ...]}.
A row is one of the results, with what its line says. The budget is null for a method without one.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

FOLDER = Path(__file__).parent / "results"
# What must be the same for rows to stand in one file. The command may name other methods.
SAME = ("commit", "torch", "dtype", "machine", "model", "model_sha256", "inputs", "asked")


def read(path: Path) -> tuple[dict, list[dict]]:
    """Provenance and rows. ValueError for a file that does not say where its rows come from."""
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}:{number}: is not JSON") from None
    lacking = [name for name in SAME if not lines or name not in lines[0]]
    if lacking:
        raise ValueError(f"{path}: its first line has no {', '.join(lacking)}: rows without"
                         " provenance are not used, measure them again")
    rows = []
    for line in lines[1:]:
        about = {name: value for name, value in line.items() if name != "results"}
        rows += [about | result for result in line.get("results", [{}])]
    return lines[0], rows


def write(path: Path, about: dict, rows: list[dict]):
    """A file whose lines are rows, anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in (about, *rows)), encoding="utf-8")


class Results:
    """The rows of a file, and which of them are there already. Without a path they are not kept."""

    def __init__(self, path: Path | None, provenance: dict):
        self.path, self.rows = path, []
        if path and path.exists() and path.stat().st_size:
            found, self.rows = read(path)
            for name in SAME:
                if json.dumps(found[name]) != json.dumps(provenance[name]):  # and in one order
                    raise ValueError(f"{path} has rows of another {name}: {found[name]!r}, and here"
                                     f" it is {provenance[name]!r}")
        else:
            self.append(provenance)

    def missing(self, task: str, index: int, methods: list) -> list:
        done = {(row["task"], row["index"], row["method"], row["budget"]) for row in self.rows}
        return [m for m in methods if (task, index, m.spec, m.row_budget) not in done]

    def add(self, task: str, index: int, results: list[dict], **about):
        """What one prompt gave."""
        about = {"task": task, "index": index, **about}
        self.rows += [about | result for result in results]
        self.append(about | {"results": results})

    def append(self, line: dict):
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def at_every_budget(rows: list[dict]) -> list[dict]:
    """What has no budget, as the full cache, was run once, and is the same at all budgets."""
    budgets = {row["budget"] for row in rows} - {None} or {None}
    return [row | {"budget": budget} for row in rows
            for budget in ([row["budget"]] if row["budget"] is not None else sorted(budgets))]


def differences(rows: list[dict], reference: str) -> list[dict]:
    """Each score less that of the method `reference`, for the same prompt and budget."""
    known = {(r["task"], r["index"], r["budget"]): r["score"] for r in rows
             if r["method"] == reference}
    return [r | {"score": r["score"] - known[r["task"], r["index"], r["budget"]]} for r in rows
            if (r["task"], r["index"], r["budget"]) in known]


def error_of(values: list[float]) -> float:
    """The standard error of the mean; 0 for one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def with_error(values: Iterable[float], scale: float = 1, form: str = ".3f") -> str:
    """The mean, and its standard error if there is more than one value. Empty for no value.

    >>> with_error([0, 1, 1, 0], 100, ".0f")
    '50 ± 29'
    """
    values = list(values)
    text = format(scale * mean(values), form) if values else ""
    if len(values) > 1:
        text += f" ± {format(scale * error_of(values), form)}"
    return text


def markdown(headings: list, lines: Iterable[Iterable]) -> str:
    """A table, without an end of line."""
    made = ["| " + " | ".join(map(str, line)) + " |" for line in (headings, *lines)]
    return "\n".join([made[0], "|---" * len(headings) + "|", *made[1:]])


class Column(NamedTuple):
    """Of a table with a line for every method: which rows, and what of them."""

    heading: str
    rows: list  # as of `at_every_budget`
    budget: int | None = None
    scale: float = 100
    form: str = ".0f"
    value: str = "score"

    def values(self, method: str) -> list[float]:
        return [row[self.value] for row in self.rows if row["method"] == method
                and row["budget"] == self.budget and self.value in row]

    def cell(self, method: str) -> str:
        """With the number of prompts in brackets, if another method has more."""
        values = self.values(method)
        text = with_error(values, self.scale, self.form)
        text = text if self.value == "score" else text.partition(" ")[0]
        most = max(Counter(row["method"] for row in self.rows
                           if row["budget"] == self.budget).values(), default=0)
        return f"{text} ({len(values)} of {most})" if 0 < len(values) < most else text


def by_method(columns: list[Column], methods: Iterable[str] = ()) -> str:
    """The lines are those of `methods`, or of all that have a row, as they were measured."""
    methods = list(methods) or dict.fromkeys(r["method"] for c in columns for r in c.rows)
    return markdown(["method", *(column.heading for column in columns)],
                    ([method, *(column.cell(method) for column in columns)] for method in methods))


def columns_of(rows: list[dict], overall: str | None) -> list[Column]:
    """A column for every task and budget, in per cent, and for the "mean" of all. Or of losses, and
    for what is "above full": above those of the full cache."""
    look = (1, ".3f") if overall == "above full" else (100, ".0f")
    rows = at_every_budget(rows)
    groups = {task: [row for row in rows if row["task"] == task]
              for task in sorted({row["task"] for row in rows})}
    if overall == "above full":
        groups[overall] = differences(rows, "full")
    elif overall and len(groups) > 1:
        groups[overall] = rows
    return [Column(f"{task} {budget or ''}".strip(), found, budget, *look)
            for task, found in groups.items()
            for budget in sorted({row["budget"] for row in found}, key=lambda b: b or 0)]
