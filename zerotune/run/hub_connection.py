"""Whether the Hugging Face hub can be reached at all, checked once before its client asks for a file."""

import functools
import os
import socket
import sys
from urllib.parse import urlsplit
from urllib.request import getproxies

SECONDS_TO_CONNECT = 5


def stay_offline_without_network() -> None:
    """Set Hugging Face's libraries offline if nothing answers at the hub's address.

    Otherwise their client asks for each file six times, for half a minute, before it uses the cache. Behind a proxy
    this is not checked.
    """
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies():
        return
    if not _answers(address.hostname, address.port or (443 if address.scheme == "https" else 80)):
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # imported later, it reads the line above
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True


@functools.cache
def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), SECONDS_TO_CONNECT).close()
    except OSError:
        return False
    return True


def is_offline_on_request() -> bool:
    """Return whether an environment variable, and not the network, keeps the libraries offline."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
