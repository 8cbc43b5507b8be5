"""Start scripts in forked processes, so that tests do not each spend seconds importing torch.

A child is a normal process with its own memory, environment, output file and exit; it can know about earlier processes
only from the disk. Each line on stdin is a request, each line on stdout an answer (see launching.py):

    {"start": {"argv": ["train/sst2.py", …], "cwd": "…", "environment": {…}, "output": "log.txt", "on_event": null}}
                    -> its pid
    {"ask": pid}    -> its exit status, -9 after SIGKILL; null while it runs
"""

import ctypes
import gc
import importlib
import json
import os
import pkgutil
import re
import runpy
import signal
import sys
import traceback

PR_SET_PDEATHSIG = 1


def main():
    import_what_scripts_import()
    gc.freeze()  # so a child's garbage collection does not copy the parent's objects
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if answer == 0:
                be_the_script(**request["start"])
        else:
            pid, status = os.waitpid(request["ask"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


def import_what_scripts_import():
    """Import all of zerotune, and the modules that libraries import on first use."""
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import matplotlib.backends.backend_svg  # noqa: F401
    import peft  # noqa: F401
    import scipy.stats  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification  # noqa: F401

    import zerotune

    for module in pkgutil.walk_packages(zerotune.__path__, "zerotune."):
        importlib.import_module(module.name)


def be_the_script(argv, cwd, environment, output, on_event):
    """Become `python argv…` in a folder; never returns."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, handle in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(handle, number)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv, sys.path[0] = argv, os.path.dirname(os.path.abspath(argv[0]))
    if on_event:
        disturb(**on_event)
    status = 1
    try:
        runpy.run_path(argv[0], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def disturb(event, path, do, occurrence=1):
    """Send this process a signal, or fill a disk, when it is about to touch a file for the nth time.

    Args:
        event: a Python audit event: "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir".
        path: a regular expression to search for in the operation's first path.
        do: name of a signal, or the path of a file that takes all the free space.
    """
    num_seen = 0

    def hook(name, arguments):
        nonlocal num_seen
        if name != event or isinstance(arguments[0], int) or not re.search(path, os.fsdecode(arguments[0])):
            return
        num_seen += 1
        if num_seen == occurrence:
            if do.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, do))
            else:
                fill_disk(do)

    sys.addaudithook(hook)


def fill_disk(path):
    with open(path, "wb", buffering=0) as file:
        for size in (2**20, 4096, 1):
            try:
                while file.write(b"0" * size):
                    pass
            except OSError:  # no space for this size: try less
                continue


if __name__ == "__main__":
    main()
