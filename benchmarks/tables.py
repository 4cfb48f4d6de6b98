"""Makes every table of the Markdown files again from the rows: `python -m benchmarks.tables`.

    <!-- table methods
    methods: full sentencekv
    single: needles_smollm2 tasks=single budget=256
    loss above full: reading_smollm2 budget=256 of=loss
    -->
    (the table)
    <!-- end of table -->

The first word says which function here makes it. The lines of `methods` are columns: heading, files
of results joined by +, which rows (tasks are patterns, as of files), and what of them. `of` is `percent`, the score; `loss`, the
score above the full cache's; `device`, the per cent of the full cache's bytes on the device; or a
value in tokens, as `held`. No torch here; the pictures are `python -m benchmarks.pictures`.
"""

import re
import sys
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from benchmarks.rows import FOLDER, Column, at_every_budget, by_method, differences, markdown, read

TOP = Path(__file__).parents[1]
FILES = [TOP / "README.md", TOP / "benchmarks/README.md", *sorted((TOP / "course").glob("*.md"))]
MARKED = re.compile(r"(<!-- table (\w+)(.*?)-->\n).*?(<!-- end of table -->)", re.DOTALL)
LOOKS = {"percent": (100, ".0f", "score"), "loss": (1, ".3f", "score"),
         "device": (100, ".1f", "device")}


@cache
def rows_of(name: str) -> list[dict]:
    """Of files joined by +, the methods without a budget repeated at all budgets."""
    found = [row for part in name.split("+") for row in read(FOLDER / f"{part}.jsonl")[1]]
    return at_every_budget(found) if "budget" in found[0] else found


def column(heading: str, files: str, of: str = "percent", budget: int | None = None,
           tasks: str = "") -> Column:
    rows = differences(rows_of(files), "full") if of == "loss" else rows_of(files)
    if tasks:
        rows = [row for row in rows if any(fnmatch(row["task"], t) for t in tasks.split(","))]
    return Column(heading, rows, int(budget), *LOOKS.get(of, (1, ",.0f", of)))


def values_of(*what) -> dict:
    """method -> the values of a column, whose arguments follow its heading."""
    found = column("", *what)
    return {method: found.values(method) for method in dict.fromkeys(
        row["method"] for row in found.rows if row["budget"] == found.budget)}


def methods(spec: str) -> str:
    columns, names = [], ()
    for line in filter(None, map(str.strip, spec.splitlines())):
        heading, _, what = line.partition(": ")
        if heading == "methods":
            names = what.split()
        else:
            files, *pairs = what.split()
            columns.append(column(heading, files, **dict(pair.split("=") for pair in pairs)))
    return by_method(columns, names)


SPEED = {  # heading: (key, divisor, format)
    "ttft s": ("ttft_ms", 1e3, ".2f"), "ms a token": ("decode_ms_per_token", 1, ".1f"),
    "p10": ("decode_p10_ms", 1, ".1f"), "p90": ("decode_p90_ms", 1, ".1f"),
    "its own ms": ("own_ms_per_token", 1, ".1f"), "floor ms": ("floor_ms", 1, ".1f"),
    "device KV MiB": ("device_kv_bytes", 2**20, ".1f"),
    "host KV MiB": ("host_kv_bytes", 2**20, ".1f"),
    "load KiB a token": ("loaded_bytes_per_token", 2**10, ".0f"),
    "hits": ("hit_rate", 1, ".0%"), "peak MiB": ("peak_device_bytes", 2**20, ".0f"),
}


def speed(rows: str | list[dict]) -> str:
    """Of a file, or of rows themselves."""
    rows = rows_of(rows.strip()) if isinstance(rows, str) else rows
    columns = {heading: column for heading, column in SPEED.items()
               if any(row.get(column[0]) is not None for row in rows)}

    def cells(row):
        for key, divisor, form in columns.values():
            yield "" if row.get(key) is None else format(row[key] / divisor, form)

    return markdown(["tokens", "method", *columns],
                    ([row["length"], row["method"], *cells(row)] for row in rows))


def stages(rows: str | list[dict]) -> str:
    """ms a token of each stage."""
    rows = rows_of(rows.strip()) if isinstance(rows, str) else rows
    timed = [row for row in rows if row["stages_ms_per_token"]]
    names = dict.fromkeys(name for row in timed for name in row["stages_ms_per_token"])
    return markdown(["tokens", "method", *names],
                    ([row["length"], row["method"],
                      *(f"{row['stages_ms_per_token'].get(name, 0):.2f}" for name in names)]
                     for row in timed))


def scale(rows: str | list[dict]) -> str:
    """ms of each stage, with the bound in brackets."""
    rows = rows_of(rows.strip()) if isinstance(rows, str) else rows
    names = ("score", "select", "load", "attend")
    return markdown(
        ["tokens", *names, "all", "bound", "hits", "device MiB", "host MiB"],
        ([f"{row['length']:,}", *(f"{row[name]:.2f} ({row['bound_ms'][name]:.2f})"
                                  for name in names),
          f"{row['all']:.2f}", f"{sum(row['bound_ms'].values()):.2f}", f"{row['hits']:.0%}",
          f"{row['device'] / 2**20:,.1f}", f"{row['host'] / 2**20:,.0f}"] for row in rows))


MAKERS = {"methods": methods, "speed": speed, "stages": stages, "scale": scale}


def made_again(text: str) -> str:
    """The text of a Markdown file, with each table as its rows give it."""
    return MARKED.sub(lambda found: f"{found[1]}{MAKERS[found[2]](found[3])}\n{found[4]}", text)


def main() -> int:
    try:
        for path in FILES:
            text = path.read_text(encoding="utf-8")
            if (again := made_again(text)) != text:
                path.write_text(again, encoding="utf-8")
                print(f"{path.relative_to(TOP)}: made again")
    except (ValueError, KeyError, OSError) as error:
        print(f"benchmarks.tables: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
