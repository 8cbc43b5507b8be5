"""Files that are written whole or not at all, JSON records, full disks, locks, names near a wrong one, the cache."""

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

from zerotune.errors import Refused
from zerotune.records import RESTORE, record_problem

RESTORE_LINE = "restore the file or remove the line"
# Our records are not nested deeper and have no longer integers.
MAX_DEPTH = 50
MAX_DIGITS = 300
BLOCK = 2**20
# So many blocks of a large file are hashed, evenly spaced: enough to tell another training step, fast enough for 14 GB.
NUM_BLOCKS = 16


def write_text(path: Path, text: str) -> None:
    """Write a text file aside, then rename it: a reader sees the old file or the new one, after a crash too."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.unlink(missing_ok=True)
        with aside.open("x", encoding="utf-8") as file:  # a planted link of that name is not followed
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
    """Call `write_text` with indented JSON; NaN is an error, for it is not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def json_sha256(value) -> str:
    """Hash plain values, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def parse_json(text: str):
    """Return the value of a JSON text.

    Raises:
        ValueError: it is no JSON, holds NaN, an infinite number or half of a surrogate pair, or is nested too deeply.
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
    raise ValueError(f"{text[:40]} is no number of JSON")


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
    """Return the record in a JSON text. Raises ValueError: it is no such JSON, or has another form."""
    value = parse_json(text)
    problem = record_problem(value, form)
    if problem:
        raise ValueError(problem)
    return value


def read_json(path: Path, form=dict[str, Any], way_out: str = RESTORE) -> dict:
    """Return the record in a JSON file.

    Args:
        form: of the record, as `check_record` takes it.
        way_out: what the user can do about a damaged file.

    Raises:
        Refused: the file holds something else, or cannot be read; the line names it.
    """
    try:
        return parse_record(path.read_text(encoding="utf-8"), form)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}): {way_out}") from None
    except ValueError as error:
        raise Refused(f"{path} is damaged ({error}): {way_out}") from None


def write_json_lines(path: Path, rows: list[dict]) -> None:
    """Call `write_text` with one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_json_lines(path: Path, form=dict[str, Any], way_out: str = RESTORE_LINE) -> list[dict]:
    """Return the whole lines of a JSON-lines file that is appended to, without a torn last line; [] without a file.

    Args: as for `read_json`.

    Raises:
        Refused: a line is no JSON or has another form; the line names file and line.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}): {way_out}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(parse_record(line.decode(), form))
        except ValueError as error:
            raise Refused(f"{path} line {number} is damaged ({error}): {way_out}") from None
    return rows


def disk_error_number(error: BaseException | None) -> int | None:
    """Return ENOSPC, EDQUOT or EFBIG where an error, or what caused it, is one of these; else None.

    safetensors has the number in its message alone.
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

    torch's writers do not always tell, so the disk itself is asked too.
    """
    return disk_error_number(error) is not None or _free_bytes(folder) < 2**20


def full_disk_reason(folder: Path, error: BaseException | None = None) -> str:
    """Return why a folder's disk takes no more files: space, inodes, a quota or a file size limit is exhausted."""
    number = disk_error_number(error)
    if number == errno.EDQUOT:
        return f"disk quota exceeded: {folder} may hold no more"
    if number == errno.EFBIG:
        return f"file too large: this process may not write larger files into {folder} (ulimit -f)"
    disk = os.statvfs(folder)
    if disk.f_files and not disk.f_favail:
        return f"no free inodes: the disk of {folder} can hold no more files"
    return f"disk full: {folder} has {_free_bytes(folder) / 2**20:.0f} MiB free"


def full_disk_cure(error: BaseException | None = None) -> str:
    """Return the way out of the problem that `full_disk_reason` names."""
    return "raise that limit" if disk_error_number(error) == errno.EFBIG else "free some space"


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def file_record(path: Path) -> dict[str, int | str]:
    """Return a file's {"bytes", "sha256"}, once it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def update_by_blocks(digest, path: Path) -> bool:
    """Add a file of up to 16 MiB to a hash, of a larger one 16 blocks of 1 MiB; return whether it was added whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for block in range(NUM_BLOCKS):
            file.seek(max(block * BLOCK, block * (size - BLOCK) // (NUM_BLOCKS - 1)))
            digest.update(file.read(BLOCK))
    return size <= NUM_BLOCKS * BLOCK


def file_problem(path: Path, wanted: dict) -> str | None:
    """Return how a file differs from its recorded {"bytes", "sha256"}; None where it does not."""
    if not path.is_file():
        return "it is missing"
    if path.stat().st_size != wanted["bytes"]:
        return f"{path.stat().st_size:,} bytes, wanted {wanted['bytes']:,}"
    found = file_sha256(path)
    return None if found == wanted["sha256"] else f"sha256 {found[:12]}, wanted {wanted['sha256'][:12]}"


def first_damage(folder: Path, files: dict[str, dict]) -> tuple[str, str] | None:
    """Return the first file of a folder that differs from its record, and how; None where all are as recorded."""
    found = ((name, file_problem(folder / name, wanted)) for name, wanted in files.items())
    return next(((name, problem) for name, problem in found if problem), None)


def follow_umask(path: Path) -> None:
    """Give a file the mode that the umask asks for; some writers make files that only their owner can read."""
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    """Return the umask without touching it, which other threads would see."""
    status = Path("/proc/self/status")
    found = re.search(r"^Umask:\s*([0-7]+)$", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return int(found[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made where it is missing and stays; no lock where the file system has none."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder last through a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def default_cache_dir() -> Path:
    """Return $ZEROTUNE_CACHE, else $XDG_CACHE_HOME/zerotune, else ~/.cache/zerotune."""
    if os.environ.get("ZEROTUNE_CACHE"):
        return Path(os.environ["ZEROTUNE_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "zerotune"


def nearest_entry(path: Path, is_wanted: Callable[[Path], bool]) -> str:
    """Return " (did you mean 'PATH'?)" where the folder of a path has a wanted entry of nearly its name; else "".

    Suffixes do not count: every .csv is like every other.
    """
    path = path.expanduser()
    try:
        stems = {entry.stem.casefold(): entry.name for entry in sorted(path.parent.iterdir()) if is_wanted(entry)}
    except OSError:
        return ""
    alike = difflib.get_close_matches(path.stem.casefold(), stems, n=1, cutoff=0.75)
    return f" (did you mean {str(path.parent / stems[alike[0]])!r}?)" if alike else ""
