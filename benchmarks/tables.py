"""Makes every table of the Markdown files again from the rows: `python -m benchmarks.tables`.

    <!-- table methods
    methods: full sentencekv
    single: needles_smollm2 tasks=single budget=256; loss: reading_smollm2 budget=128,256 of=loss
    -->
    (the table)
    <!-- end of table -->

The first word says which function here makes it. A part of `methods`, up to a line's end or a
semicolon, is a column, or one for each of several budgets and values: heading, file of results,
which rows (tasks are patterns, as of files), and what of them: `percent`, the score; `loss`, above
the full cache's; `device`, per cent of the full cache's bytes; or a value in tokens, as `held`. No
torch here.
"""

import re
import sys
from fnmatch import fnmatch
from functools import cache
from itertools import product

from benchmarks import TOP, with_status
from benchmarks.rows import FOLDER, Column, at_every_budget, by_method, differences, markdown, read

FILES = [TOP / "README.md", TOP / "benchmarks/README.md", TOP / "benchmarks/methods/README.md",
         *sorted((TOP / "course").glob("*.md"))]
MARKED = re.compile(r"(<!-- table (\w+)(.*?)-->\n).*?(<!-- end of table -->)", re.DOTALL)
LOOKS = {"percent": (100, ".0f", "score"), "loss": (1, ".3f", "score"),
         "device": (100, ".1f", "device")}


@cache
def rows_of(name: str) -> list[dict]:
    """Of a file of results. What has no budget is repeated at all budgets."""
    rows = read(FOLDER / f"{name}.jsonl")[1]
    if not rows:
        raise ValueError(f"{name}.jsonl has no rows")
    return at_every_budget(rows) if "budget" in rows[0] else rows


def column(heading: str, file: str, of: str, budget: str, tasks: str = "*") -> Column:
    """ValueError if there are no such rows, or no such value in them."""
    rows = differences(rows_of(file), "full") if of == "loss" else rows_of(file)
    rows = [row for row in rows if any(fnmatch(row["task"], task) for task in tasks.split(","))]
    made = Column(heading, rows, int(budget), *LOOKS.get(of, (1, ",.0f", of)))
    if not any(made.values(method) for method in {row["method"] for row in rows}):
        raise ValueError(f"{file}.jsonl has no {of!r} with tasks={tasks} budget={budget}")
    return made


def values_of(*what) -> dict:
    """method -> the values of a column, whose arguments follow its heading."""
    found = column("", *what)
    return {method: found.values(method) for method in dict.fromkeys(
        row["method"] for row in found.rows if row["budget"] == found.budget)}


def methods(spec: str) -> str:
    columns, names = [], ()
    for part in filter(None, map(str.strip, re.split("[;\n]", spec))):
        heading, _, what = part.partition(": ")
        if heading == "methods":
            names = what.split()
            continue
        file, *pairs = what.split()
        options = dict(pair.split("=") for pair in pairs)
        if not {"budget"} <= options.keys() <= {"budget", "of", "tasks"}:
            raise ValueError(f"{part!r} needs a budget, and can have of and tasks besides")
        budgets = options.pop("budget").split(",")
        values = options.pop("of", "percent").split(",")
        for budget, of in product(budgets, values):
            words = [heading, *[budget] * (len(budgets) > 1), *[of] * (len(values) > 1)]
            columns.append(column(" ".join(words).strip(), file, of, budget, **options))
    for name in names:
        if not any(made.values(name) for made in columns):
            raise ValueError(f"no column has a row of method {name!r}")
    return by_method(columns, names)


SPEED = {  # heading: (key, divisor, format)
    "ttft s": ("ttft_ms", 1e3, ".2f"), "floor ms": ("floor_ms", 1, ".1f"),
    "device KV MiB": ("device_kv_bytes", 2**20, ",.1f"),
    "host KV MiB": ("host_kv_bytes", 2**20, ",.0f"),
    "load KiB a token": ("loaded_bytes_per_token", 2**10, ",.0f"), "hits": ("hit_rate", 1, ".0%"),
    "peak MiB": ("peak_device_bytes", 2**20, ",.0f"),
    "operators": ("operators_per_token", 1, ",.0f"),
}


def times(spec: str) -> str:
    """Of a file of results. If methods are named after it, with semicolons, their bytes alone are
    shown besides the times."""
    file, _, names = spec.strip().partition(" ")
    names = [name.strip() for name in names.split(";") if name]
    rows = [row for row in rows_of(file) if not names or row["method"] in names]
    return times_of(rows, ("device KV MiB", "host KV MiB") if names else [*SPEED][:6])


def times_of(rows: list[dict], headings=tuple(SPEED)) -> str:
    """A line a method: ms a token after each length, in brackets the percentiles 10 (if it was
    measured) and 90, and what the method says itself. The other columns are of the last length."""
    def cell(row, heading):
        key, divisor, form = SPEED[heading]
        return "" if row.get(key) is None else format(row[key] / divisor, form)

    def ms(row):
        tenths = (row.get(key) for key in ("decode_p10_ms", "decode_p90_ms"))
        spread = " to ".join(f"{ms:.1f}" for ms in tenths if ms is not None)
        own = row.get("own_ms_per_token")
        own = "" if own is None else f", own {own:.1f}"
        return f"{row['decode_ms_per_token']:.1f} ({spread}{own})"

    at = {(row["method"], row["length"]): row for row in rows}
    names, lengths = (dict.fromkeys(row[key] for row in rows) for key in ("method", "length"))
    headings = [heading for heading in headings if any(cell(row, heading) for row in rows)]
    return markdown(["method", *(f"ms after {length:,}" for length in lengths), *headings],
                    ([name, *(ms(at[name, n]) if (name, n) in at else "" for n in lengths),
                      *(cell(at.get((name, max(lengths)), {}), heading) for heading in headings)]
                     for name in names))


def stages(rows: list[dict]) -> str:
    """ms a token of each stage."""
    timed = {(row["length"], row["method"]): row["stages_ms_per_token"] for row in rows
             if row["stages_ms_per_token"]}
    names = dict.fromkeys(name for found in timed.values() for name in found)
    return markdown(["tokens", "method", *names],
                    ([*who, *(f"{found[name]:.2f}" if name in found else "" for name in names)]
                     for who, found in timed.items()))


def operators(rows: list[dict], n_shown: int = 12) -> list[str]:
    """A table for every row that was profiled: the operators or kernels that take longest, and at
    the end how many a token has in all."""
    made = []
    for row in filter(lambda row: row.get("operators"), rows):
        found = row["operators"]
        lines = [[name, f"{number:.0f}", f"{ms:.2f}"] for name, (number, ms) in found.items()]
        number, ms = (sum(column) for column in zip(*found.values()))
        made.append(markdown([f"{row['method']}, {row['length']:,} tokens", "number", "ms"],
                             [*lines[:n_shown], ["all", f"{number:.0f}", f"{ms:.2f}"]]))
    return made


def scale(rows: list[dict]) -> str:
    """ms of each stage, with the bound in brackets."""
    names = ("score", "select", "load", "attend")
    return markdown(
        ["tokens", *names, "all", "bound", "hits", "device MiB", "host MiB"],
        ([f"{row['length']:,}", *(f"{row[name]:.2f} ({row['bound_ms'][name]:.2f})"
                                  for name in names),
          f"{row['all']:.2f}", f"{sum(row['bound_ms'].values()):.2f}", f"{row['hits']:.0%}",
          f"{row['device'] / 2**20:,.1f}", f"{row['host'] / 2**20:,.0f}"] for row in rows))


def segmentation(rows: list[dict]) -> str:
    first, *rules = rows
    return "\n\n".join((
        markdown(["golden rules", "precision", "recall", "F1", "million characters a second"], [[
            f"{first['golden']} of {first['of']}", f"{first['precision']:.3f}",
            f"{first['recall']:.3f}", f"{first['f1']:.3f}",
            f"{first['characters_per_second'] / 1e6:.1f}"]]),
        markdown(["spans of tokens", "number", "median", "longest", "end in the middle"], (
            [row["rule"], f"{row['spans']:,}", f"{row['median']:.0f}", row["longest"],
             f"{row['in_the_middle']:.1%}"] for row in rules))))


def lesson_answers(_) -> str:
    """The answers of the runs that lessons show."""
    return markdown(["options", "device", "ms/token", "answer"], (
        [f"`{row['run']}`", f"{row['device_kv_bytes'] / row['full_kv_bytes']:.1%}",
         f"{row['decode_ms_per_token']:.0f}", row["text"]] for row in rows_of("lessons")))


def lesson_bytes(asked: str) -> str:
    """What some of these runs hold, in bytes and in tokens of 46,080 bytes. `asked` names their
    options, with a semicolon between two runs."""
    runs = [row for options in asked.split(";") for row in rows_of("lessons")
            if row["run"] == options.strip()]
    return markdown(["options", "", "bytes", "tokens"], (
        [f"`{row['run']}`", name, f"{size:,}", f"{size / 46080:,.1f}"]
        for row in runs for name, size in bytes_held(row).items() if size))


def bytes_held(row: dict) -> dict:
    parts = row["device_kv_parts"] if len(row["device_kv_parts"]) > 1 else {}
    return parts | {f"`{name}_kv_bytes`": row[f"{name}_kv_bytes"]
                    for name in ("device", "host", "full")}


def lesson_loads(_) -> str:
    """What these runs select and load in all steps, and the hit rate of all but the first one,
    which loads all that it selects."""
    lines = []
    for row in (row for row in rows_of("lessons") if row["selected_bytes"]):
        selected, loaded, steps = row["selected_bytes"], row["loaded_bytes"], row["decode_steps"]
        first = selected / steps
        lines.append([f"`{row['run']}`", steps, f"{selected:,}", f"{loaded:,}",
                      f"{row['hit_rate']:.1%}", f"{1 - (loaded - first) / (selected - first):.1%}"])
    return markdown(["options", "steps", "`selected_bytes`", "`loaded_bytes`", "`hit_rate`",
                     "without the first step"], lines)


MAKERS = {"methods": methods, "times": times, "lesson_answers": lesson_answers,
          "lesson_bytes": lesson_bytes, "lesson_loads": lesson_loads,
          "scale": lambda file: scale(rows_of(file.strip())),
          "segmentation": lambda file: segmentation(rows_of(file.strip()))}


def made_again(text: str) -> str:
    """The text of a Markdown file, with each table as its rows give it."""
    begun, ended = text.count("<!-- table "), text.count("<!-- end of table -->")
    if begun != ended:
        raise ValueError(f"{begun} tables begin, and {ended} end")

    def again(found):
        if found[2] not in MAKERS:
            raise ValueError(f"table {found[2]!r} is not one of {', '.join(MAKERS)}")
        return f"{found[1]}{MAKERS[found[2]](found[3])}\n{found[4]}"

    return MARKED.sub(again, text)


@with_status
def main(arguments=None):
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if (made := made_again(text)) != text:
            path.write_text(made, encoding="utf-8")
            print(f"{path.relative_to(TOP)}: made again")


if __name__ == "__main__":
    sys.exit(main())
