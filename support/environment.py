"""Imported before torch: the environment variables that torch reads, and Ctrl-C during the imports.

A variable that is set already stays as it is.
"""

import _signal as signal  # built in. The module `signal` takes longer to import
import _thread
import os

# Waiting CPU threads sleep early. Busy waiting can delay the thread that they wait for.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Eight threads pin the host memory that a GPU reads. One thread would take longer.
os.environ.setdefault("PYTORCH_ALLOC_CONF",
                      "pinned_use_cuda_host_register:True,pinned_num_register_threads:8")

KEPT = []  # functions that the system calls: Python must not free them


def end_at_interrupt():
    """Ctrl-C ends the program without a traceback, unless it is ignored: a shell has its background
    jobs ignore it. For the imports, which take seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_at_bus_error():
    """A file that is mapped into memory, as weights and saved documents are, can be cut by another
    program, or its disk can fail. Then the system sends SIGBUS to the thread that reads it, often
    one of torch. The program can only print a line and end: Python calls a handler of its own after
    the instruction that failed, which never ends. ctypes calls this one at once, and takes the GIL
    for it, which torch has released while it reads."""
    import ctypes  # takes longer than the modules above

    told = _thread.allocate_lock()

    def tell(number):
        told.acquire()  # for good: several threads can read the file
        os.write(2, b"generate.py: a file was cut while it was in use, or its disk failed\n")
        os._exit(2)

    KEPT.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(tell))
    ctypes.CDLL(None).signal(signal.SIGBUS, KEPT[-1])
