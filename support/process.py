"""The start and the end of the process: streams, signals, exit statuses, lines for errors."""

import os
import re
import signal
import sys
from functools import wraps

from support.environment import end_at_bus_error, raise_at_interrupt
from support.report import say

MEMORY = "out of memory|can't allocate|not enough memory|unable to mmap"  # in a RuntimeError


def start(rank: int = 0):
    """For a program of its own: prepare signals and streams. Only rank 0 prints."""
    raise_at_interrupt()
    end_at_bus_error()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` is still run
    if rank > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    for name in ("stdout", "stderr", "stdin"):
        stream = getattr(sys, name)
        if stream is not None:
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character
        elif name != "stdin":  # it is closed: what is printed is lost, but nothing fails
            setattr(sys, name, open(os.devnull, "w"))


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
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except KeyboardInterrupt:
            status, problem = 130, "interrupted"
        except Exception as error:
            status, problem = explained(error)
            if status == 1 and "--debug" in arguments:
                raise
        say(f"generate.py: {problem}")
        return status

    return guarded


def explained(error: Exception) -> tuple[int, str]:
    """The exit status of an error, and the line that says what went wrong."""
    if isinstance(error, (ValueError, OSError)):
        return 2, str(error)
    first_line = f"{error}".partition("\n")[0]
    # Of the GPU, of pinned memory or of the CPU.
    out_of_memory = isinstance(error, RuntimeError) and re.search(MEMORY, first_line)
    if out_of_memory or isinstance(error, MemoryError):
        return 2, ("out of memory: a shorter prompt, a lower --token-budget or --dtype bfloat16"
                   f" needs less ({first_line})")
    line = f"{type(error).__name__}: {error} (an error of this program: --debug shows where)"
    return 1, line
