"""An object in a process of its own, with limits of time and memory.

What comes with the weights can be anyone's: a chat template is a program, and a tokenizer has
regular expressions and replacements. A library that runs them can loop forever, take all memory, or
end its process, and no exception tells of it. A process can be stopped.
"""

import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path

# Limits of one call, in seconds and bytes. Each byte of its arguments adds:
SECONDS, MEMORY, MORE_SECONDS, MORE_MEMORY = 10, 2**31, 1e-5, 256
MOST_RESULT = 2**28  # bytes
SECONDS_TO_START = 30  # also on a busy machine
ROOT = Path(__file__).resolve().parent.parent


class Worker:
    """`make(*args)` of a module, in a process that is started for the first call, and again after
    it was stopped. What goes in and out is JSON."""

    def __init__(self, module: str, make: str, *args):
        self.made_of = [module, make, *args]
        self.process, self.ready = None, False

    def call(self, method: str, *args):
        """What the method returns. ValueError if it fails, or exceeds a limit."""
        request = json.dumps([method, *args]).encode()
        seconds, memory = SECONDS + MORE_SECONDS * len(request), MEMORY + MORE_MEMORY * len(request)
        limits = f"{seconds} {int(memory)} {MOST_RESULT} ".encode()
        try:
            self.start()
            if not self.ready:  # until it waits for calls, other limits hold
                self.reply(time.monotonic() + SECONDS_TO_START)
                self.ready = True
            latest = time.monotonic() + seconds
            self.send(limits + request + b"\n", latest)
            reply = self.reply(latest)
        except TimeoutError:
            self.stop()
            raise ValueError(f"it takes more than {seconds:.0f} seconds") from None
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
        weakref.finalize(self, end, self.process)  # also at the end of the program

    def stop(self):
        if self.process:
            end(self.process)
        self.process, self.ready = None, False

    def reply(self, latest: float) -> dict:
        """ValueError if there is none in time, or if the process has ended."""
        in_time = select.select([self.process.stdout], [], [], left_until(latest))[0]
        line = self.process.stdout.readline() if in_time else b""
        if line.endswith(b"\n"):
            return json.loads(line)
        if in_time and self.process.wait() != -signal.SIGXCPU:
            raise ValueError("it was stopped, or needs too much memory")
        raise TimeoutError

    def send(self, data: bytes, latest: float):
        """Write a request, as far as the process takes it in time."""
        pipe, data = self.process.stdin, memoryview(data)
        os.set_blocking(pipe.fileno(), False)
        with suppress(BrokenPipeError):  # it has ended, and there is no reply
            while data and select.select([], [pipe], [], left_until(latest))[1]:
                data = data[os.write(pipe.fileno(), data) :]


def left_until(latest: float) -> float:
    """Seconds, 0 if it is over."""
    return max(0, latest - time.monotonic())


def end(process: subprocess.Popen):
    """Twice is as good as once."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # a request that was not written whole
            pipe.close()


def serve(module: str, make: str, *args):
    """Answer calls, a line each, until standard input is closed. The first line says that the
    object is made."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a library may print
    allowed = {kind: least(resource.getrlimit(kind))
               for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)}
    limit(allowed, SECONDS, MEMORY)
    target, problem = outcome(lambda: getattr(importlib.import_module(module), make)(*args))
    replies.write(b"{}\n")
    replies.flush()
    for line in sys.stdin.buffer:
        seconds, memory, most, request = line.split(b" ", 3)
        limit(allowed, float(seconds), int(memory))
        replies.write(answer(target, problem, request, int(most)).encode() + b"\n")
        replies.flush()


def least(limits: tuple) -> int:
    """Of a soft and a hard limit."""
    return min((x for x in limits if x != resource.RLIM_INFINITY), default=resource.RLIM_INFINITY)


def limit(allowed: dict, seconds: float, memory: int):
    """Limit this process until its next call, but no higher than what the user allows. Processor
    time is limited, too: if the program is killed, nobody else stops an endless loop."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = {resource.RLIMIT_AS: memory,
            resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime + seconds) + 1}
    for kind, value in most.items():
        hard = resource.getrlimit(kind)[1]
        with suppress(ValueError, OSError):  # macOS refuses some
            resource.setrlimit(kind, (least((value, allowed[kind])), hard))


def answer(target, problem: str | None, request: bytes | str, most: int = MOST_RESULT) -> str:
    """The reply to a request, as JSON. `problem` says why there is no `target`."""
    method, *values = json.loads(request)
    call = lambda: checked(json.dumps(getattr(target, method)(*values)), most)
    result, problem = (None, problem) if problem else outcome(call)
    if problem:
        return json.dumps({"error": problem})
    return f'{{"result": {result}}}'  # which is JSON already: `outcome` caught what cannot be


def outcome(function) -> tuple:
    """What the function returns and None, or None and what it raises, in one line."""
    try:
        return function(), None
    except MemoryError:
        return None, "it needs too much memory"
    except BaseException as error:  # a panic of a library is no Exception
        return None, " ".join(f"{error}".split())[:300] or type(error).__name__


def checked(result: str, most: int) -> str:
    if len(result) > most:
        raise ValueError("it makes too much text")
    return result


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    serve(*json.loads(sys.argv[2]))
