"""What Ctrl-C and SIGTERM do: they end the program with an exception, once, or are only noted."""

import signal
import sys
import time
from contextlib import contextmanager

KINDS = signal.SIGINT, signal.SIGTERM
PATIENCE = 5  # seconds: a signal that comes again sooner is taken for the same request


def stop(number: int, _=None):
    """Raise what ends the program after this signal. SystemExit has the exit status."""
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def stop_once():
    """A handler that raises what `stop` raises, and nothing for a while after it: a key that is
    held down must not interrupt the clean-up."""
    last = -PATIENCE

    def handler(number, _):
        nonlocal last
        if time.monotonic() - last >= PATIENCE:
            last = time.monotonic()
            stop(number)

    return handler


def handle(handler):
    """Have the signals call `handler(number, frame)`. One that is ignored stays ignored: a shell
    has its background jobs ignore Ctrl-C."""
    for kind in KINDS:
        if signal.getsignal(kind) != signal.SIG_IGN:
            signal.signal(kind, handler)


@contextmanager
def handled(handler):
    """In here the signals call `handler`."""
    before = [signal.getsignal(kind) for kind in KINDS]
    try:
        handle(handler)
        yield
    finally:
        for kind, old in zip(KINDS, before):
            signal.signal(kind, old)


@contextmanager
def not_interrupted():
    """In here Ctrl-C waits. It does not reach programs that are started, such as a compiler."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def noted():
    """In here signals raise nothing: the list that this yields gets their numbers. If SIGTERM does
    not end it in `PATIENCE` seconds, for example because nobody reads the pipe, it is raised."""
    came = []

    def note(number, _):
        if number == signal.SIGTERM and number not in came:
            stop_later(number, PATIENCE)
        came.append(number)

    with handled(note):
        try:
            yield came
        finally:
            if signal.SIGTERM in came:
                signal.alarm(0)


def stop_later(number: int, seconds: int):
    signal.signal(signal.SIGALRM, lambda *_: stop(number))
    signal.alarm(seconds)


def raise_again(unraisable):
    """Python calls this with an exception that it drops, as it does while an object is destroyed.
    If a signal caused it, it is raised again a second later."""
    kinds = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}
    if kind := kinds.get(unraisable.exc_type):
        stop_later(kind, 1)
    else:
        sys.__unraisablehook__(unraisable)
