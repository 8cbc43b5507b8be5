"""Arrays in a cache: one file each, named after what they were computed from, whole or not there.

Any number of processes and nodes may write the same file at once: each writes its own aside and renames it, and
whichever comes last replaces an equal one.
"""

import hashlib
import io
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from zerotune.errors import Refused

DIGEST_BYTES = hashlib.sha256().digest_size


def content_key(settings: list, texts: Iterable[str]) -> str:
    """Hash of settings (numbers, strings, None) and texts; none can be mistaken for a part of its neighbour."""
    digest = hashlib.sha256(repr(settings).encode())
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """One file: the sha256 of the rest, then an uncompressed npz. Raises Refused where it cannot be written."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    data = buffer.getbuffer()
    aside = path.with_name(f".{path.stem}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                file.write(hashlib.sha256(data).digest())
                file.write(data)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise Refused(
            f"{path.parent}: the token cache cannot be written ({error.strerror}); set ZEROTUNE_CACHE to another folder"
        ) from None


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What `save_arrays` wrote; None where the file is missing, unreadable or torn, and is to be written again."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    body = memoryview(data)[DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != data[:DIGEST_BYTES]:
        return None
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
        return dict(arrays)
