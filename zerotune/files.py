"""Write files whole or not at all, check JSON, explain full disks, hold locks, suggest paths, find the cache."""

import difflib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zerotune.errors import BrokenMachine, Refused
from zerotune.records import RESTORE, record_problem

RESTORE_LINE = "restore the file or remove the line"
# Our records nest less deeply and have shorter integers.
MAX_DEPTH = 50
MAX_DIGITS = 300
BLOCK = 2**20
# Blocks of a large file that are hashed, evenly spaced: enough to detect another training step, fast enough for 14 GB.
NUM_BLOCKS = 16


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it, so that a crash leaves the old or the new file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.unlink(missing_ok=True)
        with aside.open("x", encoding="utf-8") as file:  # does not follow a planted link of that name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, ValueError) as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a failed write does not name its file
        raise


def write_json(path: Path, value) -> None:
    """Write a value as indented JSON with `write_text`. Raises ValueError for NaN, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def write_in_place(path: Path, value: dict) -> None:
    """Write a short JSON object over a file that exists, which takes no space: for a full disk."""
    with path.open("r+") as file:
        file.write(json.dumps(value))
        file.truncate()


def json_sha256(value) -> str:
    """Return the SHA-256 of plain values; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def parse_json(text: str):
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or holds NaN, an infinite number, an integer of more than
            MAX_DIGITS digits or half of a surrogate pair.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_number, parse_float=_finite, parse_int=_moderate)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    if text.count("{") + text.count("[") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    if re.search(r"\\u[dD][89a-fA-F]", text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _refuse_number(text: str):
    raise ValueError(f"{text[:40]} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _moderate(text: str) -> int:
    return int(text) if len(text) <= MAX_DIGITS else _refuse_number(text)


def _is_deeper(value, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    children = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(child, levels - 1) for child in children)


def parse_record(text: str, form):
    """Return the record in a JSON text. Raises ValueError as `parse_json` does, or if it has another form."""
    value = parse_json(text)
    problem = record_problem(value, form)
    if problem:
        raise ValueError(problem)
    return value


def read_json(path: Path, form=dict[str, Any], way_out: str = RESTORE) -> dict:
    """Return the record in a JSON file.

    Args:
        form: the record's form, as for `check_record`.
        way_out: what the user can do about a damaged file.

    Raises:
        Refused: the file holds something else or cannot be read; the message names it.
    """
    try:
        return parse_record(path.read_text(encoding="utf-8"), form)
    except OSError as error:
        raise unreadable(path, error, way_out) from None
    except ValueError as error:
        raise Refused(f"{path} is damaged ({error}): {way_out}") from None


def write_json_lines(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line with `write_text`."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_json_lines(path: Path, form=dict[str, Any], way_out: str = RESTORE_LINE) -> list[dict]:
    """Return the rows of a JSON-lines file that is appended to, without a torn last line; [] if there is no file.

    Args: as for `read_json`.

    Raises:
        Refused: the file cannot be read, or a line is not JSON or has another form; the message says where.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(path, error, way_out) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(parse_record(line.decode(), form))
        except ValueError as error:
            raise Refused(f"{path} line {number} is damaged ({error}): {way_out}") from None
    return rows


# Errors of a disk or network that may pass: another start, or another node, may succeed.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EREMOTEIO}


def may_pass(error: BaseException | None) -> bool:
    """Return whether an error means that a disk did not answer, not that a file is bad or missing."""
    return isinstance(error, OSError) and error.errno in _PASSING


def unreadable(path: Path, error: OSError, way_out: str) -> Refused:
    """Return the error for a file that cannot be read: BrokenMachine if it may pass, else Refused."""
    if may_pass(error):
        return BrokenMachine(f"{path} cannot be read ({error.strerror}): start the same command again")
    return Refused(f"{path} cannot be read ({error.strerror}): {way_out}")


def is_there(path: Path) -> bool:
    """Return whether a path exists; also False without permission to look. Raises BrokenMachine as `unreadable`."""
    try:
        os.stat(path)
    except OSError as error:
        if may_pass(error):
            raise unreadable(path, error, "") from error
        return False
    return True


def disk_error_number(error: BaseException | None) -> int | None:
    """Return ENOSPC, EDQUOT or EFBIG if an error or one of its causes has that number; else None.

    safetensors gives the number only in its message.
    """
    while error is not None:
        said = re.search(r"\(os error (\d+)\)", str(error))
        number = int(said[1]) if said else getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return number
        error = error.__cause__ or error.__context__
    return None


def disk_is_full(folder: Path, error: BaseException) -> bool:
    """Return whether an error came from a full disk, a quota or a limit on the size of files.

    torch's writers do not always say so, so the disk's free space is checked too.
    """
    return disk_error_number(error) is not None or _free_bytes(folder) < 2**20


def _full_disk_reason(folder: Path, error: BaseException | None = None) -> str:
    """Return why a folder's disk accepts no more files: space, inodes, a quota or a file size limit is exhausted."""
    number = disk_error_number(error)
    if number == errno.EDQUOT:
        return f"disk quota exceeded: {folder} may hold no more"
    if number == errno.EFBIG:
        return f"file too large: this process may not write larger files into {folder} (ulimit -f)"
    disk = os.statvfs(folder)
    if disk.f_files and not disk.f_favail:
        return f"no free inodes: the disk of {folder} can hold no more files"
    return f"disk full: {folder} has {_free_bytes(folder) / 2**20:.0f} MiB free"


def full_disk_refusal(folder: Path, error: BaseException | None = None, detail: str = "", resumes: bool = False) -> str:
    """Return the message for a disk that accepts no more data.

    Args:
        folder: on that disk; it need not exist.
        error: None: the disk has too little room for what follows.
        detail: words after the reason.
        resumes: whether the same command resumes from a checkpoint.
    """
    place = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    cure = "raise that limit" if disk_error_number(error) == errno.EFBIG else "free some space"
    again = "start the same command again" + (", it resumes from the last checkpoint" if resumes else "")
    return f"{_full_disk_reason(place, error)}{detail}; {cure} and {again}"


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def file_record(path: Path) -> dict[str, int | str]:
    """Flush a file to the disk and return its {"bytes", "sha256"}."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def update_by_blocks(digest, path: Path) -> bool:
    """Add a file to a hash, or 16 blocks of 1 MiB if it is larger than 16 MiB; return whether it was added whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for block in range(NUM_BLOCKS):
            file.seek(max(block * BLOCK, block * (size - BLOCK) // (NUM_BLOCKS - 1)))
            digest.update(file.read(BLOCK))
    return size <= NUM_BLOCKS * BLOCK


def file_problem(path: Path, wanted: dict) -> str | None:
    """Return how a file differs from its recorded {"bytes", "sha256"}; None if it does not."""
    if not path.is_file():
        return "it is missing"
    if path.stat().st_size != wanted["bytes"]:
        return f"{path.stat().st_size:,} bytes, wanted {wanted['bytes']:,}"
    found = file_sha256(path)
    return None if found == wanted["sha256"] else f"sha256 {found[:12]}, wanted {wanted['sha256'][:12]}"


def first_damage(folder: Path, files: dict[str, dict]) -> tuple[str, str] | None:
    """Return the first file of a folder that differs from its record, and how; None if all are as recorded."""
    found = ((name, file_problem(folder / name, wanted)) for name, wanted in files.items())
    return next(((name, problem) for name, problem in found if problem), None)


def follow_umask(path: Path) -> None:
    """Give a file the mode that the umask asks for; some writers make files that only their owner can read."""
    with suppress(PermissionError):  # a file system without modes
        path.chmod(0o666 & ~_umask())


def _umask() -> int:
    """Return the umask, on Linux without setting it: other threads would see that."""
    status = Path("/proc/self/status")
    found = re.search(r"^Umask:\s*([0-7]+)$", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return int(found[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def hold_lock(path: Path, or_refuse: str | None = None) -> Iterator[None]:
    """Hold a lock on a file, which is created if missing and kept; hold none on a file system without locks.

    Args:
        or_refuse: the message of Refused where another process has the lock; None: wait for it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if or_refuse else 0))
        except BlockingIOError:
            raise Refused(or_refuse) from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder survive a power failure, where the file system can do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(handle)


def default_cache_dir() -> Path:
    """Return $ZEROTUNE_CACHE, else $XDG_CACHE_HOME/zerotune, else ~/.cache/zerotune."""
    if os.environ.get("ZEROTUNE_CACHE"):
        return Path(os.environ["ZEROTUNE_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "zerotune"


def why_not_writable(folder: Path) -> str | None:
    """Return why a folder cannot be made or written into; None if it can. Nothing is created."""
    found = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.exists(each))
    if not os.path.isdir(found):
        return f"{found} is a file"
    return None if os.access(found, os.W_OK | os.X_OK) else f"{found} is not writable"


def nearest_entry(path: Path, is_wanted: Callable[[Path], bool]) -> str:
    """Return " (did you mean 'PATH'?)" if a path's folder has a wanted entry with a similar name; else "".

    Suffixes are ignored, because a shared .csv would make all names similar.
    """
    path = path.expanduser()
    try:
        stems = {entry.stem.casefold(): entry.name for entry in sorted(path.parent.iterdir()) if is_wanted(entry)}
    except OSError:
        return ""
    alike = difflib.get_close_matches(path.stem.casefold(), stems, n=1, cutoff=0.75)
    return f" (did you mean {str(path.parent / stems[alike[0]])!r}?)" if alike else ""
