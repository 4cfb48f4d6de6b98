"""An object in another process: its results, its limits, its end."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from support import worker as module
from support.worker import Worker

STRANGER = '''
import os, sys, time
class Stranger:
    def __init__(self, *args):
        if args == ("fail",):
            raise ValueError("not today\\n\\x1b[2J")
        self.args = args
    def add(self, a, b):
        return a + b
    def limits(self):
        import resource
        return [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS)]
    def pid(self):
        return os.getpid()
    def loop(self):
        while True:
            pass
    def sleep(self):
        time.sleep(1000)
    def grow(self):
        x = []
        while True:
            x.append(bytearray(2**24))
    def abort(self):
        os.abort()
    def panic(self):
        raise BaseException("a panic\\nof two lines")
    def talk(self):
        print("{}")
        os.write(1, b"noise")
        return 1
    def much(self):
        return "x" * 10**6
    def loud(self):
        raise ValueError("x" * 10**6)
'''


@pytest.fixture
def make(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda *args: Worker("stranger", "Stranger", *args)


def test_a_call_returns_what_the_method_does(make):
    worker = make("a", 1)
    assert worker.call("add", [1], [2.5, None]) == [1, 2.5, None]
    assert worker.call("add", "é\ud800", "\n") == "é\ud800\n"
    assert worker.call("pid") == worker.call("pid") != os.getpid()
    assert worker.call("talk") == 1


@pytest.mark.parametrize("method, message", [
    ("loop", "more than 1 seconds"), ("sleep", "more than 1 seconds"), ("grow", "memory"),
    ("abort", "it was stopped"), ("panic", "a panic of two lines"), ("much", "too much text"),
    ("loud", "^x{300}$"), ("absent", "no attribute 'absent'")])
def test_what_fails_is_a_line_and_the_next_call_is_answered(make, monkeypatch, method, message):
    monkeypatch.setattr(module, "SECONDS", 1 if method in ("loop", "sleep") else 10)
    monkeypatch.setattr(module, "MEMORY", 2**28)
    monkeypatch.setattr(module, "MOST_RESULT", 10**6)
    worker = make()
    with pytest.raises(ValueError, match=message) as error:
        worker.call(method)
    assert "\n" not in str(error.value)
    assert worker.call("add", 1, 2) == 3


def test_an_object_that_cannot_be_made_says_so_at_each_call(make):
    worker = make("fail")
    for _ in range(2):
        with pytest.raises(ValueError, match="not today"):
            worker.call("add", 1, 2)


def test_arguments_are_longer_than_a_pipe_holds(make):
    assert len(make().call("add", "x" * 10**6, "y")) == 10**6 + 1


def test_a_process_that_somebody_stops_is_not_waited_for(make, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 1)
    monkeypatch.setattr(module, "MORE_SECONDS", 0)
    worker = make()
    for text in ("x", "x" * 10**6):  # which a pipe does not hold
        os.kill(worker.call("pid"), signal.SIGSTOP)
        with pytest.raises(ValueError, match="more than 1 seconds"):
            worker.call("add", text, "")


def test_a_signal_ends_a_call_and_the_process(make):
    worker, pid = make(), None

    def alarm(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, alarm)
    try:
        pid = worker.call("pid")
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            worker.call("loop")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended(pid) and worker.call("add", 1, 2) == 3


def test_the_process_ends_with_the_worker_and_with_the_program(make, tmp_path):
    worker = make()
    pid = worker.call("pid")
    del worker
    gc.collect()
    assert ended(pid)
    code = ("import os, signal, sys; from support.worker import Worker\n"
            "w = Worker('stranger', 'Stranger'); print(w.call('pid'), flush=True)\n")
    for end in ("", "sys.exit(3)", "os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"):
        done = subprocess.run([sys.executable, "-c", code + end], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"})
        assert ended(int(done.stdout)) and not done.stderr, end


def test_a_limit_of_the_user_that_is_lower_stays(make, tmp_path):
    code = ("import resource as r; r.setrlimit(r.RLIMIT_CPU, (5, 5))\n"
            "r.setrlimit(r.RLIMIT_AS, (2**30, r.RLIM_INFINITY))\n"
            "from support.worker import Worker\n"
            "w = Worker('stranger', 'Stranger'); print(w.call('limits'), w.call('limits'))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    assert (done.stdout, done.stderr) == ("[5, 1073741824] [5, 1073741824]\n", "")


def ended(pid: int) -> bool:
    """Within two seconds. A zombie that nobody waits for has ended, too."""
    for _ in range(200):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False
