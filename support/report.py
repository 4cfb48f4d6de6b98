"""The report of an answer: as a dict, as tables for people, as a line of JSON.

What is for people goes to standard error: standard output holds the answer. With --json it holds a
line for each report and nothing else, and the answer goes to standard error, too.
"""

import json
import os
import sys

import torch
from tqdm import tqdm

from support.ranks import added_up
from support.timer import OTHER, times

MOST = 1000  # characters in a line for people
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
PICTURES |= {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)


def say(*lines, end="\n"):
    """Print lines for people, on standard error."""
    show("\n".join(map(one_line, lines)), end)


def complain(problem):
    """Print what went wrong, an exception or its text."""
    say(f"generate.py: {problem}")


def one_line(text: str) -> str:
    """A text in one line of at most `MOST` characters: its middle is left out."""
    line = " ".join(text.splitlines())
    return line if len(line) <= MOST else f"{line[: MOST // 2]} … {line[3 - MOST // 2 :]}"


def show(text: str = "", end: str = "\n"):
    """Print on standard error. Where that is closed or full, the answer is not lost."""
    try:
        print(visible(text), end=end, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")


def visible(text: str) -> str:
    """A text whose control characters are pictures: a terminal would obey them."""
    return text.translate(PICTURES)


def printer(as_json: bool):
    """What prints an answer: on standard error with --json. A file gets it as it is."""
    if as_json:
        return show
    shown = visible if sys.stdout.isatty() else str
    return lambda text="", end="\n": print(shown(text), end=end, flush=True)


def progress(parts, what: str = "prefill", unit: str = "layer"):
    """The layers, or other parts, with a bar that moves while they are read: in a terminal only."""
    return tqdm(parts, desc=what, unit=unit, leave=False, disable=None)


def printed(pairs, written: list, special: set, stopped, as_json: bool) -> str:
    """Print the pieces of (token, piece) as they come, until `stopped()`, and add the tokens to
    `written`. Special tokens are not printed. Returns the text."""
    text, put = "", printer(as_json)
    try:
        for token, piece in pairs:
            written.append(token)
            if token not in special:
                text += piece
                put(piece, end="")
            if stopped():
                break
    except Exception:
        put()
        raise
    put()
    return text


def describe(session, text: str, signal: int, question: str | None = None) -> dict:
    """The report of the answer that a session has just written: counts, times in ms, bytes.

    `signal` ended the answer, or is 0. `question` is None if the prompt holds it.
    """
    n_new = len(session.written)
    report = {} if question is None else {"question": question}
    report |= {
        "text": text, "interrupted": bool(signal), "signal": signal,
        "prompt_tokens": len(session.ids), "new_tokens": n_new, "sentences": len(session.spans),
        "sentence_limit": session.config.sentence_limit, **times(session.timer),
        **added_up(session.cache.report()), "cache": session.args.cache,
        "clock": session.timer.clock,
        "device": str(session.device), "dtype": str(session.dtype).removeprefix("torch."),
        "torch": torch.__version__}
    if session.trace:
        pieces = session.tokenizer.pieces(session.ids + session.written)
        session.trace.add(question or "", pieces, session.spans, report)
        report["most_attended"] = session.trace.most_attended()
    return report


def finish(report: dict, session, stopped) -> int:
    """Print times and memory, and write the trace. Returns the exit status: the answer is there
    even if the trace cannot be written. `stopped()` is 0, or the signal that came."""
    args = session.args
    if "question" in report:
        say("{ttft_ms:.0f} ms to the first token, {decode_ms_per_token:.1f} ms/token".format(
            **report), *fast_lines(report))
    else:
        print_tables(report)
    if args.show_sentences:
        print_sentences(report["most_attended"])
    if args.json:
        printer(False)(json.dumps(report))
    status = write_trace(session, stopped) if args.trace else 0
    return 128 + number if (number := stopped()) else status


def write_trace(session, stopped) -> int:
    """Write the trace, with --trace-full a second time: whatever happens while all is read again,
    what the answer attended to is not lost. Returns the exit status."""
    trace, args = session.trace, session.args
    if status := tried(trace.write, args.trace):
        return status
    say("", f"{args.trace} shows what the answer attended to")
    if not args.trace_full or stopped():
        return 0
    say("a full cache reads all tokens again, which takes as long as before; Ctrl-C ends it")
    try:
        trace.add_full(session.ids + session.written, session.max_tokens, args.prefill_chunk,
                       lambda parts: until(stopped, progress(parts, "full cache", "part")))
    except Stopped:
        say(f"{args.trace} does not show what a full cache attends to")
        return 0
    finally:
        session.timer.totals()  # these times are of no answer
    if not (status := tried(trace.write, args.trace)):
        say(f"{args.trace} also shows what a full cache attends to")
    return status


class Stopped(Exception):
    """A signal came."""


def until(stopped, parts):
    """The parts of a long piece of work. Raises `Stopped` if a signal came before one of them."""
    for part in parts:
        if stopped():
            raise Stopped
        yield part


def tried(write, *arguments) -> int:
    """Write a file. Returns the exit status: 2, after a line, if it cannot be written."""
    try:
        write(*arguments)
    except ValueError as error:
        complain(error)
        return 2
    return 0


def print_sentences(sentences: list[dict]):
    say("", "attention  place  sentences of the text that received most")
    for sentence in sentences:
        say("{share:9.1%} {place:6.0%}  {text}".format(**sentence))
    if not sentences:
        say("none: nothing was selected")


def print_tables(report: dict):
    rows = [*time_rows(report), ("", "", ""), *memory_rows(report)]
    say("", "{prompt_tokens} prompt tokens in {sentences} sentences of at most {sentence_limit}"
        " tokens, {new_tokens} new tokens".format(**report),
        "{cache} cache, {device}, {dtype}, torch {torch}, timed by {clock}".format(**report), "",
        *("{:<26}{:>14}{:>20}".format(*row).rstrip() for row in rows))
    if report["hit_rate"] is not None:
        say(f"{report['hit_rate']:.1%} of the selected rows were on the device")
    if lines := fast_lines(report):
        say(*lines)


def time_rows(report: dict) -> list[tuple]:
    stages, steps = report["stages_ms"], max(report["decode_steps"], 1)
    prefill, decode = stages["prefill"], stages["decode"]
    rows = [("stage", "ttft ms", "decode ms/token")]
    for name in ("tokenize", "segment"):
        rows.append((name, f"{stages[name]['total']:.1f}", ""))
    parts = [name for name in {**prefill, **decode} if name not in (OTHER, "total")]
    for name in [*parts, OTHER]:
        rows.append((name, f"{prefill[name]:.1f}" if name in prefill else "",
                     f"{decode[name] / steps:.2f}" if name in decode else ""))
    rows.append(("total", f"{report['ttft_ms']:.1f}", f"{decode['total'] / steps:.2f}"))
    return rows


def fast_lines(report: dict) -> list[str]:
    """What --fast did, in the answer in which it compiled."""
    if "compile" not in report["stages_ms"]:
        return []
    seconds = report["stages_ms"]["compile"]["total"] / 1e3
    line = f"--fast: compiling took {seconds:.1f} s"
    if report["fast_steps"]:
        graph = " in a CUDA graph" if report["device"].startswith("cuda") else ""
        line += (f"; {report['fast_steps']} tokens after it{graph} took"
                 f" {report['decode_ms_per_token']:.1f} ms each")
    return [line]


def memory_rows(report: dict) -> list[tuple]:
    sizes = {f"device: {name}": size for name, size in report["device_kv_parts"].items()}
    sizes |= {"device: everything": report["device_kv_bytes"], "host": report["host_kv_bytes"],
              "full cache": report["full_kv_bytes"], "selected in all": report["selected_bytes"],
              "loaded in all": report["loaded_bytes"]}
    rows = [("memory", "MiB", "of the full cache")]
    rows += [(name, f"{size / 2**20:.2f}", f"{size / report['full_kv_bytes']:.1%}")
             for name, size in sizes.items()]
    return rows
