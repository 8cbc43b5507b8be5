"""Checkpoints written to node-local scratch while training waits, and moved to the run folder in the background.

DIR/zerotune-RUN-NODE/rank-0/…    a rank's files until they are moved

A thread on each rank copies, verifies and hashes them.
"""

import contextlib
import errno
import hashlib
import os
import platform
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import json_sha256
from zerotune.training import checkpoints
from zerotune.training.snapshot import StateFile

_CHUNK_BYTES = 2**22


class Scratch:
    """A rank's folder on scratch for the files of one checkpoint. All ranks create and close it together.

    Args:
        scratch: --scratch-dir, on each node's own disk or in its memory (/dev/shm).
        root: the run's checkpoints/ folder.
    Raises:
        Refused: a rank cannot write in `scratch`.
    """

    waits = False

    def __init__(self, scratch: Path, root: Path, accelerator):
        self._of_run = scratch / f"zerotune-{json_sha256(str(root.resolve()))[:12]}-{platform.node()}"
        self._own = self._of_run / f"rank-{accelerator.process_index}"
        first = accelerator.is_local_main_process
        checkpoints.agree(accelerator, _attempt(scratch, self._make_run_folder) if first else None)
        checkpoints.agree(accelerator, _attempt(scratch, self._own.mkdir))

    def _make_run_folder(self) -> None:
        """Create the run's folder on this node, and delete what a killed run left in it.

        Other users may write to the scratch disk, so a folder that belongs to another user is refused.
        """
        self._of_run.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(self._of_run):
            found = self._of_run.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise Refused(f"{self._of_run} is a link or belongs to somebody else: delete it, or use another folder")
            shutil.rmtree(self._of_run)
        self._of_run.mkdir(mode=0o700)

    def begin(self, files: list[StateFile], aside: Path, num_bytes: int) -> Callable[[], dict[str, dict]]:
        """Write a rank's files to scratch. Returns the function with which a thread moves them to `aside`.

        Args:
            num_bytes: of the checkpoint, for the message if a disk is full.
        Raises:
            Refused: the scratch disk is full.
        """
        source = self._own / aside.name
        try:
            source.mkdir(parents=True)  # the site may have cleaned the disk
            written = [file.write(source) for file in files]
        except Exception as error:
            raise Refused(checkpoints.full_disk_line(self._of_run.parent, num_bytes, error)) from error
        return lambda: _move(written, source, aside, num_bytes)

    def close(self) -> None:
        """Delete this rank's files from the scratch disk."""
        shutil.rmtree(self._own, ignore_errors=True)
        with contextlib.suppress(OSError):  # other ranks of this node still use it
            self._of_run.rmdir()


def _attempt(scratch: Path, make: Callable[[], None]) -> str | None:
    """Call `make`, which creates a folder in --scratch-dir. Returns why it failed, or None."""
    try:
        make()
    except Refused as refusal:
        return f"--scratch-dir {scratch}: {refusal}"
    except OSError as error:
        return f"--scratch-dir {scratch} cannot be written ({error.strerror}): make it writable, or leave it out"
    return None


def _move(files: list[Path], source: Path, aside: Path, num_bytes: int) -> dict[str, dict]:
    """Copy files from one folder to another and delete the first. Returns their manifest entries.

    Raises:
        Refused: the disk of `aside` is full.
        OSError: a copy read back differs from its original.
    """
    try:
        entries = {}
        for file in files:
            copy = aside / file.relative_to(source)
            copied = _copy(file, copy)
            entries |= checkpoints.hash_files(aside, [copy])
            if entries[str(copy.relative_to(aside))]["sha256"] != copied:
                raise OSError(errno.EIO, "a file changed while it was copied", str(copy))
    except Exception as error:
        raise Refused(checkpoints.full_disk_line(aside.parent, num_bytes, error)) from error
    shutil.rmtree(source)
    return entries


def _copy(file: Path, copy: Path) -> str:
    """Copy a file. Returns the SHA-256 of what was read."""
    digest = hashlib.sha256()
    with file.open("rb") as reading, copy.open("wb") as writing:
        while chunk := reading.read(_CHUNK_BYTES):
            digest.update(chunk)
            writing.write(chunk)
    return digest.hexdigest()
