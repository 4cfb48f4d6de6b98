"""An object in a process of its own, with limits of time and memory.

What comes with the weights can be anyone's: a chat template is a program, and a tokenizer has
regular expressions and replacements. A library that runs them can loop forever, take all memory, or
end its process, and no exception tells of it. A process can be stopped.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path

SECONDS, MEMORY = 10, 2**31  # of one call; seconds, bytes. Besides, for each byte of its arguments:
MORE_SECONDS, MORE_MEMORY = 1e-5, 256
MOST_RESULT = 2**28  # bytes
ROOT = Path(__file__).resolve().parent.parent


class Worker:
    """`make(*args)` of a module, in a process that is started for the first call, and again after
    it was stopped. What goes in and out is JSON."""

    def __init__(self, module: str, make: str, *args):
        self.made_of = [module, make, *args]
        self.process = self.end = None

    def call(self, method: str, *args):
        """What the method returns. ValueError if it fails, or exceeds a limit."""
        request = json.dumps([method, *args]).encode() + b"\n"
        try:
            self.start()
            reply = self.exchange(request, SECONDS + MORE_SECONDS * len(request),
                                  MEMORY + MORE_MEMORY * len(request))
        except BaseException:  # also of a signal: the reply to this call is not that to the next
            self.stop()
            raise
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["result"]

    def start(self):
        """Start the process before it is needed, unless it runs."""
        if self.process:
            return
        path = json.dumps([str(ROOT), *filter(None, sys.path)])
        command = [sys.executable, "-I", __file__, path, json.dumps(self.made_of)]
        self.process = subprocess.Popen(  # a session of its own: Ctrl-C in a terminal is not for it
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True)
        self.end = weakref.finalize(self, end, self.process)  # also at the end of the program

    def stop(self):
        if self.process:
            self.end()
        self.process = self.end = None

    def exchange(self, request: bytes, seconds: float, memory: int) -> dict:
        """ValueError if there is no reply in time, or the process has ended."""
        latest, replies = time.monotonic() + seconds, [self.process.stdout]
        in_time = self.send(f"{seconds} {memory} ".encode() + request, latest) and (
            os.name == "nt" or select.select(replies, [], [], left_until(latest))[0])
        line = self.process.stdout.readline() if in_time else b""
        if line.endswith(b"\n"):
            return json.loads(line)
        if in_time and self.process.wait() != -signal.SIGXCPU:
            raise ValueError("it was stopped, or needs too much memory")
        raise ValueError(f"it takes more than {seconds:.0f} seconds")

    def send(self, data: bytes, latest: float) -> bool:
        """Whether the process has taken all of it in time. One that was stopped does not."""
        pipe, data = self.process.stdin, memoryview(data)
        with suppress(BrokenPipeError):  # it has ended, and the reply is empty
            if os.name == "nt":
                pipe.write(data)
                pipe.flush()
                return True
            os.set_blocking(pipe.fileno(), False)
            while data and select.select([], [pipe], [], left_until(latest))[1]:
                data = data[os.write(pipe.fileno(), data):]
            return not data
        return True


def left_until(latest: float) -> float:
    """Seconds, 0 if it is over."""
    return max(0, latest - time.monotonic())


def end(process: subprocess.Popen):
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # a request that was not written whole
            pipe.close()


def limit(seconds: float, memory: int):
    """Limit this process until its next call. Its time on the processor is limited, too: nobody
    would stop it if the program were killed."""
    try:
        import resource
    except ImportError:  # Windows has none of these limits
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    set_limit(resource, resource.RLIMIT_AS, memory)
    set_limit(resource, resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 1)


def set_limit(resource, kind: int, most: int):
    """Or leave it at what the user has set, if that is less."""
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with suppress(ValueError, OSError):  # macOS refuses some
        resource.setrlimit(kind, (most, hard))


def serve(module: str, make: str, *args):
    """Answer calls, a line each, until standard input is closed."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a library may print
    limit(SECONDS, MEMORY)
    target, problem = outcome(lambda: getattr(importlib.import_module(module), make)(*args))
    for line in sys.stdin.buffer:
        seconds, memory, request = line.split(b" ", 2)
        limit(float(seconds), int(memory))
        method, *values = json.loads(request)
        result, error = problem and (None, problem) or outcome(
            lambda: checked(json.dumps(getattr(target, method)(*values))))
        reply = json.dumps({"error": error}) if error else f'{{"result": {result}}}'
        replies.write(reply.encode() + b"\n")
        replies.flush()


def outcome(function) -> tuple:
    """What the function returns and None, or None and what it raises, in one line."""
    try:
        return function(), None
    except MemoryError:
        return None, "it needs too much memory"
    except BaseException as error:  # a panic of a library is no Exception
        return None, " ".join(f"{error}".split())[:300] or type(error).__name__


def checked(result: str) -> str:
    if len(result) > MOST_RESULT:
        raise ValueError("it makes too much text")
    return result


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    serve(*json.loads(sys.argv[2]))
