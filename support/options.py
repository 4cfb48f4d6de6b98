"""The options of the command line: what --help says, and which values and pairs are refused."""

import argparse
import sys
from pathlib import Path

from support.outputs import check_outputs
from support.ranks import check_environment

SETTINGS = {  # of the method: the flags, and what --help says
    "token_budget": "tokens that a KV head attends to while decoding",
    "keep_factor": "keep this many times the budget of the prompt's tokens; paper: 1 to 5",
    "sink_tokens": "first tokens, always attended to; paper: 32",
    "secondary_sinks": "most tokens with very short keys, always attended to; paper: 0",
    "recent_window": "last tokens, always attended to",
    "score": "score of a sentence, {scores}; paper: mean_query",
    "query_decay": "each token multiplies the weight of earlier queries by it; paper: 1",
    "kv_bits": "of each channel that is remembered: 8, or 16 for the model's dtype; paper: 16",
    "sentence_limit": "most tokens in a sentence; a longer one is cut",
    "reuse_layers": "of so many layers, the first chooses sentences for all: less memory",
}
SWITCHES = {
    "--cuda-graph": "replay each token as one CUDA graph: faster, not timed",
    "--compile": "compile a token's step when decoding begins: faster later",
    "--fast": "after some tokens, the fastest step of this machine: compiled, on a GPU in a graph",
    "--raw": "no chat template: continue the text as it is",
    "--special-tokens": "special tokens spelled in the prompt are not text",
    "--chat": "questions from the terminal; Ctrl-C ends an answer, Ctrl-D all",
    "--show-sentences": "print the sentences that received most attention",
    "--debug": "show where an error of the program is raised",
    "--json": "standard output is JSON alone, a line for each answer",
}


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the usage and exit
        raise ValueError(message)

    def print_help(self, file=None):  # argparse would not say that it cannot be written
        print(self.format_help(), end="", file=file, flush=True)


def parse(arguments: list[str], description: str | None, defaults, scores, n_ranks: int):
    """The options as a namespace, those of the method also as a dict `settings`, and the files that
    will be written as `outputs`, by their options.

    --help has the first line of `description`. `defaults` has the default of each setting as an
    attribute, `scores` are the names that --score can have, `n_ranks` the processes that share the
    model. ValueError for what is refused.
    """
    check_environment()
    first_line = (description or "").partition("\n")[0]  # Python can leave docstrings out
    args = parser(first_line, defaults, scores).parse_args(arguments)
    args.settings = {name: getattr(args, name) for name in SETTINGS}
    check_numbers(args)
    check_questions(args)
    check_files(args)
    check_pairs(args)
    if n_ranks > 1:
        check_ranks(args)
    return args


def parser(description: str, defaults, scores) -> Parser:
    parser = Parser(description=description)

    def add(name, default, help, **how):
        help = f"{help} (%(default)s)"
        parser.add_argument(name, default=default, type=type(default), help=help, **how)

    parser.add_argument("--prompt", metavar="FILE", help="text file; - is standard input")
    parser.add_argument("--ask", action="append", default=[], metavar="QUESTION",
                        help="about the text, which is read once; may be given several times")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep what was read of it")
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on from it: no --prompt")
    parser.add_argument("--trace", type=Path, metavar="FILE",
                        help="write a page of what each token attends to; or its data, .json")
    parser.add_argument("--trace-full", action="store_true",
                        help="in that page also what a full cache attends to, and so what was"
                             " missed; all is read twice, in twice the time")
    parser.add_argument("--model", type=Path,
                        help="DIR, FILE.gguf or NAME (smollm2-135m-instruct)")
    add("--cache", "sentencekv", "where keys and values are kept", choices=("sentencekv", "full"))
    for name, help in SETTINGS.items():
        add(flag(name), getattr(defaults, name), help.format(scores=" or ".join(scores)))
    add("--prefill-chunk", 8192, "tokens read at a time: fewer take less memory, and more time")
    add("--max-new-tokens", 256, "write no more than this")
    add("--temperature", 0.0, "0 takes the most likely token")
    add("--top-p", 1.0, "nucleus sampling: up to this cumulative probability")
    add("--seed", 0, "random seed for sampling")
    add("--device", "auto", "auto, cpu, cuda, cuda:1, …")
    add("--dtype", "auto", "auto: bfloat16 where the hardware computes in it",
        choices=("auto", "float32", "bfloat16", "float16"))
    for name, help in SWITCHES.items():
        parser.add_argument(name, action="store_true", help=help)
    return parser


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_numbers(args):
    """Those of the method are checked where it is: in its configuration."""
    in_range = {
        "max_new_tokens": args.max_new_tokens >= 1,
        "prefill_chunk": args.prefill_chunk >= 1,
        "temperature": args.temperature == 0 or 1e-3 <= args.temperature <= 1e3,
        "top_p": 0 < args.top_p <= 1,
        "seed": 0 <= args.seed < 2**63,
    }
    for name, good in in_range.items():
        if not good:
            raise ValueError(f"{flag(name)} cannot be {getattr(args, name)}")


def check_questions(args):
    if (args.prompt is None) == (args.load is None):
        raise ValueError("either --prompt or --load is needed")
    if (args.ask or args.chat) and args.raw:
        raise ValueError("--ask and --chat need a chat template, not --raw")
    if any(not question.strip() for question in args.ask):
        raise ValueError("--ask is empty")
    if args.chat and (args.ask or args.prompt == "-"):
        raise ValueError("--chat takes questions from standard input: no --ask and no --prompt -")
    if args.chat and sys.stdin is None:
        raise ValueError("standard input is closed")


def check_files(args):
    """Before an hour of reading, not after it."""
    if args.cache == "full" and (args.save or args.load):
        raise ValueError("--save and --load need --cache sentencekv")
    args.outputs = check_outputs(args)


def check_pairs(args):
    if args.trace_full and not args.trace:
        raise ValueError("--trace-full needs --trace FILE: it adds to that page")
    traced = args.trace or args.show_sentences
    if traced and args.cache == "full":
        raise ValueError("a full cache selects nothing: there is nothing to show")
    if args.fast and (args.cuda_graph or args.compile):
        raise ValueError("--fast chooses the step itself: no --cuda-graph, no --compile")
    for name in ("cuda_graph", "compile", "fast"):
        if getattr(args, name) and traced:
            raise ValueError(f"{flag(name)} is not for --trace and --show-sentences: they look into"
                             " every step")
        if getattr(args, name) and args.cache == "full":
            raise ValueError(f"{flag(name)} needs --cache sentencekv: a full cache grows at every"
                             " token")


def check_ranks(args):
    """Several processes share the model."""
    if args.reuse_layers > 1:
        raise ValueError(f"--reuse-layers {args.reuse_layers} is for a single process: it adds up"
                         " the scores of all KV heads")
    for name in ("compile", "fast"):
        if getattr(args, name):
            raise ValueError(f"{flag(name)} is for a single process")
    if (args.chat or args.save or args.load or args.trace or args.show_sentences
            or args.prompt == "-"):
        raise ValueError("of several processes each reads --prompt FILE; --chat, --save, --load,"
                         " --trace and --show-sentences need a single one")
