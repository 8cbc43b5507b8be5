"""A lock on the folder in which DeepSpeed compiles its C++; it is released when the process that holds it ends."""

import errno
import fcntl
import os


class BuildLock:
    """Replaces torch.utils.file_baton.FileBaton, whose lock is the presence of a file.

    A process that is killed while it compiles leaves that file behind, and every later run waits forever. A file lock
    (flock) ends with the process.

    Args:
        lock_file_path: path of the file.
        waiting: how often torch would check for the file; not used.
    """

    def __init__(self, lock_file_path: str, **waiting):
        self._path, self._file = lock_file_path, None

    def try_acquire(self) -> bool:
        """Try to take the lock, and return whether this process has it now.

        Raises:
            OSError: the file system has no file locks; TORCH_EXTENSIONS_DIR can name a folder on another one.
        """
        file = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        self._file = file
        return True

    def wait(self) -> None:
        """Wait until the process that has the lock releases it or dies."""
        try:
            file = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:  # released
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        os.close(file)

    def release(self) -> None:
        """Release the lock, and delete the file for programs that check for its presence."""
        if os.path.exists(self._path):
            os.remove(self._path)
        os.close(self._file)
        self._file = None


def survive_killed_builds() -> None:
    """Make torch compile extensions under a `BuildLock`."""
    from torch.utils import cpp_extension

    cpp_extension.FileBaton = BuildLock
