"""Run third-party code, such as a chat template, in a child process with limits on time and memory."""

import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path

CPU_SECONDS = 10
MEMORY_BYTES = 2**30
# Wall-clock limit, for a child that waits and so uses no CPU time.
SECONDS = 120


class OverLimit(Exception):
    """The child used more time or memory than allowed, or died."""


def call_bounded(function: Callable[[], str]) -> str:
    """Call a function in a forked child with limits on time and memory, and return its result.

    The child has the caller's objects; its changes to them are lost.

    Raises:
        OverLimit: the child exceeded a limit or died; the message is a predicate, such as "takes more than 10 s".
        Exception: any error of the function.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_call_in_child, args=(function, sender), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            raise OverLimit(f"takes more than {SECONDS} s")
        is_result, found = receiver.recv()
    except EOFError:
        raise OverLimit(f"takes more than {CPU_SECONDS} s, or ends the process that runs it") from None
    finally:
        receiver.close()
        child.kill()
        child.join()
    if is_result:
        return found
    if isinstance(found, MemoryError):
        raise OverLimit(f"takes more than {MEMORY_BYTES / 2**30:.0f} GiB")
    raise found


def _call_in_child(function: Callable[[], str], sender) -> None:
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, CPU_SECONDS)
    pages = Path("/proc/self/statm")
    if pages.exists():  # the child begins with the caller's address space
        _limit(resource.RLIMIT_AS, int(pages.read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES)
    try:
        answer = True, function()
    except Exception as error:
        answer = False, error
    try:
        sender.send(answer)
    except Exception:  # an error that cannot be pickled
        sender.send((False, RuntimeError(f"{type(answer[1]).__name__}: {answer[1]}")))


def _limit(kind: int, most: int) -> None:
    """Lower a limit of this process, unless it is lower already."""
    lowest = min([most, *(value for value in resource.getrlimit(kind) if value != resource.RLIM_INFINITY)])
    resource.setrlimit(kind, (lowest, lowest))
