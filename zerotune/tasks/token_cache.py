"""Arrays in a cache: one file per entry, named by a hash of its inputs, complete or absent.

Any number of processes and nodes may want the same entry at once. One computes it, and the others wait for its lock and
read. On a file system without locks, each computes the entry itself, writes it aside and renames it; the last one
replaces an equal file.
"""

import hashlib
import io
import os
import uuid
import zipfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from zerotune.errors import Refused
from zerotune.files import hold_lock

DIGEST_BYTES = hashlib.sha256().digest_size


def content_key(settings: list, texts: Iterable[str]) -> str:
    """Return a hash of settings (numbers, strings, None) and texts, including where each text ends."""
    digest = hashlib.sha256(repr(settings).encode())
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def cached_arrays(
    path: Path, compute: Callable[[], dict[str, np.ndarray]], fits: Callable[[dict[str, np.ndarray]], bool]
) -> dict[str, np.ndarray]:
    """Return the entry at `path`; if there is none that fits, `compute` and write it.

    Args:
        fits: whether arrays have the names, types and shapes of this entry.
    Raises:
        Refused: the cache cannot be written.
    """

    def read() -> dict[str, np.ndarray] | None:
        arrays = load_arrays(path)
        return arrays if arrays is not None and fits(arrays) else None

    if (arrays := read()) is not None:
        return arrays
    lock = path.with_suffix(".lock")
    with ExitStack() as held:
        with suppress(OSError):  # without the lock, if another user owns it, the entry is still computed
            make_private_folder(path.parent)
            held.enter_context(hold_lock(lock))
            # a process that waits for the deleted file still finds the entry, or computes it a second time
            held.callback(lock.unlink, missing_ok=True)
        if (arrays := read()) is None:  # else another process has written it while this one waited
            save_arrays(path, arrays := compute())
    return arrays


def are_rows(values: np.ndarray, offsets: np.ndarray, num_rows: int) -> bool:
    """Return whether `offsets`, [rows + 1], cut `values`, [tokens], into `num_rows` rows."""
    return (
        values.ndim == 1
        and values.dtype.kind in "iu"
        and offsets.shape == (num_rows + 1,)
        and offsets.dtype == np.int64
        and offsets[0] == 0
        and offsets[-1] == len(values)
        and bool((np.diff(offsets) >= 0).all())
    )


def make_private_folder(folder: Path) -> None:
    """Make a folder that only its owner can enter, because entries are trusted. An existing one keeps its mode."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write one file: the sha256 of the rest, then an uncompressed npz. Raises Refused if it cannot be written."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    data = buffer.getbuffer()
    aside = path.with_name(f".{path.stem}.{uuid.uuid4().hex}")
    try:
        make_private_folder(path.parent)
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
    """Return the arrays of `save_arrays`; None if the file is missing, unreadable, damaged or of another kind."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    body = memoryview(data)[DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != data[:DIGEST_BYTES]:
        return None
    try:
        with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile):  # TypeError: a bare array
        return None
