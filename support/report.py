"""The report of an answer: as a dict, as tables for people, as a line of JSON.

What is for people goes to standard error: standard output holds the answer. With --json it holds a
line for each report and nothing else, and the answer goes to standard error, too.
"""

import json
import os
import sys
from functools import partial

import torch
from tqdm import tqdm

from support.ranks import added_up
from support.timer import OTHER, times


def say(*lines, end="\n"):
    """Print for people, on standard error. Where that is closed or full, the answer is not lost."""
    try:
        print(*lines, sep="\n", end=end, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")


def printer(as_json: bool):
    """What prints an answer: with --json, `say`."""
    return say if as_json else partial(print, flush=True)


def progress(layers):
    """The layers, with a bar that moves while they are read: in a terminal only."""
    return tqdm(layers, desc="prefill", unit="layer", leave=False, disable=None)


def printed(pairs, written: list, special: set, stopped, as_json: bool) -> str:
    """Print the pieces of (token, piece) as they come, until `stopped()`, and add the tokens to
    `written`. Special tokens are not printed. Returns the text."""
    text, show = "", printer(as_json)
    try:
        for token, piece in pairs:
            written.append(token)
            if token not in special:
                text += piece
                show(piece, end="")
            if stopped():
                break
    finally:
        show()
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
        "sentence_limit": session.config.sentence_limit, **times(session.timer, n_new - 1),
        **added_up(session.cache.report()), "cache": session.args.cache,
        "clock": session.timer.clock,
        "device": str(session.device), "dtype": str(session.dtype).removeprefix("torch."),
        "torch": torch.__version__}
    if session.trace:
        pieces = session.tokenizer.pieces(session.ids + session.written)
        session.trace.add(question or "", pieces, session.spans, report)
        report["most_attended"] = session.trace.most_attended()
    return report


def finish(report: dict, trace, args) -> int:
    """Print times and memory, and write the trace. Returns the exit status."""
    if "question" in report:
        say("{ttft_ms:.0f} ms to the first token, {decode_ms_per_token:.1f} ms/token".format(
            **report))
    else:
        print_tables(report)
    if args.show_sentences:
        print_sentences(report["most_attended"])
    if args.json:
        print(json.dumps(report), flush=True)
    if args.trace:
        trace.write(args.trace)
        say(f"\n{args.trace} shows what the answer attended to")
    return 128 + report["signal"] if report["interrupted"] else 0


def print_sentences(sentences: list[dict]):
    say("\nattention  place  sentences of the text that received most")
    for sentence in sentences:
        say("{share:9.1%} {place:6.0%}  {text}".format(**sentence))
    if not sentences:
        say("none: nothing was selected")


def print_tables(report: dict):
    rows = [*time_rows(report), *memory_rows(report)]
    say("\n{prompt_tokens} prompt tokens in {sentences} sentences of at most {sentence_limit}"
        " tokens, {new_tokens} new tokens\n"
        "{cache} cache, {device}, {dtype}, torch {torch}, timed by {clock}\n".format(**report),
        *("{:<26}{:>14}{:>20}".format(*row) for row in rows))
    if report["hit_rate"] is not None:
        say(f"{report['hit_rate']:.1%} of the selected rows were on the device")


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
    rows.append(("total", f"{report['ttft_ms']:.1f}", f"{report['decode_ms_per_token']:.2f}"))
    return rows


def memory_rows(report: dict) -> list[tuple]:
    sizes = {f"device: {name}": size for name, size in report["device_kv_parts"].items()}
    sizes |= {"device: everything": report["device_kv_bytes"], "host": report["host_kv_bytes"],
              "full cache": report["full_kv_bytes"], "selected in all": report["selected_bytes"],
              "loaded in all": report["loaded_bytes"]}
    rows = [("\nmemory", "MiB", "of the full cache")]
    rows += [(name, f"{size / 2**20:.2f}", f"{size / report['full_kv_bytes']:.1%}")
             for name, size in sizes.items()]
    return rows
