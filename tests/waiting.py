"""Wait for another process or thread, but not forever."""

import time
from collections.abc import Callable


def wait_until(is_so: Callable[[], object], what: str, seconds: float = 120, pause: float = 0.02) -> None:
    """Wait until `is_so()` is true, checking every `pause` seconds.

    Raises:
        TimeoutError: it was not true within `seconds`; the message contains `what`.
    """
    give_up = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > give_up:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(pause)
