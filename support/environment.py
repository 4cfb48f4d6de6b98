"""Imported before torch: the environment variables that torch reads, and Ctrl-C during the imports.

A variable that is set already stays as it is.
"""

import _signal as signal  # built in. The module `signal` takes longer to import
import os

# Waiting CPU threads sleep early. Busy waiting can delay the thread that they wait for.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Eight threads pin the host memory that a GPU reads. One thread would take longer.
os.environ.setdefault("PYTORCH_ALLOC_CONF",
                      "pinned_use_cuda_host_register:True,pinned_num_register_threads:8")


def end_at_interrupt():
    """Ctrl-C ends the program without a traceback, unless it is ignored: a shell has its background
    jobs ignore it. For the imports, which take seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
