"""A lock on the folder in which DeepSpeed compiles its C++, which ends with the process that holds it."""

import errno
import fcntl
import os


class BuildLock:
    """Takes the place of torch.utils.file_baton.FileBaton, whose lock is the presence of a file.

    A process that is killed while it compiles leaves that file, and every later run waits for ever. A file lock
    (flock) ends with the process.

    Args:
        lock_file_path: path of the file.
        waiting: how often torch would look whether the file is there; not used.
    """

    def __init__(self, lock_file_path: str, **waiting):
        self._path, self._file = lock_file_path, None

    def try_acquire(self) -> bool:
        """Return whether this process has the lock now.

        Raises:
            OSError: the file system has no file locks; TORCH_EXTENSIONS_DIR can name a folder on another.
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
        """Wait until the process that has the lock gives it back or is dead."""
        try:
            file = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:  # given back
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        os.close(file)

    def release(self) -> None:
        """Give the lock back; the file goes too, so that programs that look for its presence find none."""
        if os.path.exists(self._path):
            os.remove(self._path)
        os.close(self._file)
        self._file = None


def survive_killed_builds() -> None:
    """Let torch compile extensions under a `BuildLock`."""
    from torch.utils import cpp_extension

    cpp_extension.FileBaton = BuildLock
