"""The start and the end of the process: streams, signals, exit statuses, lines for errors."""

import os
import re
import signal
import sys
from contextlib import suppress
from functools import wraps

from support.compiled import is_compilers, reason
from support.environment import end_at_bus_error
from support.ranks import RankLost
from support.report import complain
from support.signals import handle, raise_again, stop_once

MEMORY = ("out of memory|can't allocate|not enough memory|unable to mmap|can't start new thread"
          "|Resource temporarily unavailable")  # in a RuntimeError


def run(main, rank: int = 0, leave=sys.exit):
    """Run `main()` as a program of its own, and end it by `leave(status)`. Only rank 0 prints.

    Ctrl-C and SIGTERM raise an exception once. After `main` they are ignored.
    """
    try:
        try:
            handle(stop_once())
            end_at_bus_error()
            sys.unraisablehook = raise_again
            open_streams(rank)
            status = main()
        finally:
            handle(signal.SIG_IGN)
            signal.alarm(0)
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:
        status = end.code
    leave(flushed(status))


def open_streams(rank: int):
    if rank > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    for name in ("stdout", "stderr", "stdin"):
        stream = getattr(sys, name)
        if stream is not None:
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character
            make_blocking(stream)
        elif name != "stdin":  # it is closed: what is printed is lost, but nothing fails
            setattr(sys, name, open(os.devnull, "w"))


def make_blocking(stream):
    """Have reading and writing wait, also if another program has set the stream to fail instead."""
    with suppress(OSError):
        os.set_blocking(stream.fileno(), True)


def flushed(status: int) -> int:
    """The exit status, once all that was printed has been written: Python itself would complain if
    it cannot be. After a signal, unwritten output is thrown away."""
    try:
        if status < 128:
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        status = status or 141
    except OSError as error:
        if status == 0:
            complain(error)
        status = status or 2
    discard_output()
    return status


def discard_output():
    """What is still to be written to standard output goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def with_exit_status(main):
    """Have `main(arguments)` return an exit status instead of raising, and print one line:

        0    what it returns itself, if all went well
        1    an error of the program; with --debug it is raised, to show where
        2    an error of the user or of the machine
        130  after Ctrl-C
        141  whoever reads the answer has closed it
        143  after SIGTERM
    """
    @wraps(main)
    def guarded(arguments=None) -> int:
        arguments = sys.argv[1:] if arguments is None else list(map(str, arguments))
        try:
            return main(arguments)
        except BrokenPipeError:
            discard_output()
            return 141
        except KeyboardInterrupt:
            status, problem = 130, "interrupted"
        except Exception as error:
            status, problem = explained(error)
            if status == 1 and "--debug" in arguments:
                raise
            if isinstance(error, RankLost):  # rank 0 may be the one that is lost
                sys.stderr = sys.__stderr__ or sys.stderr
        complain(problem)
        return status

    return guarded


def explained(error: Exception) -> tuple[int, str]:
    """The exit status of an error, and what went wrong."""
    text = f"{error}" or type(error).__name__
    if is_compilers(error):
        return 2, f"--compile: the compiler failed: {reason(error)}"
    if isinstance(error, (ValueError, OSError)):
        return 2, text
    first_line = text.partition("\n")[0]
    # Of the GPU, of pinned memory or of the CPU.
    out_of_memory = isinstance(error, RuntimeError) and re.search(MEMORY, first_line)
    if out_of_memory or isinstance(error, MemoryError):
        return 2, ("out of memory: a shorter prompt, a lower --token-budget or --dtype bfloat16"
                   f" needs less ({first_line})")
    return 1, f"{type(error).__name__}: {error} (an error of this program: --debug shows where)"
