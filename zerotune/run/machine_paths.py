"""Paths of this machine in texts that leave it: found, and cut to their last name."""

import os
import re
import tempfile
from pathlib import Path

# Folders below which the paths of users, disks and jobs are, on this machine or on another.
_ROOTS = {
    "home",
    "Users",
    "root",
    "tmp",
    "var",
    "mnt",
    "data",
    "scratch",
    "work",
    "opt",
    "srv",
    "usr",
    "media",
    "lustre",
}
_END = r"[^\s\"'`<>&|,;:)(\]\[}{]"


def _pattern() -> re.Pattern:
    """Return what an absolute path looks like here, one from the home folder, or one that leads out of a folder."""
    here = {entry.name for entry in os.scandir("/") if entry.is_dir()}
    roots = "|".join(map(re.escape, sorted(_ROOTS | here)))
    # not behind a name, a scheme's slashes or a tag's bracket: those of "and/or", https://host/home/x and </data> stay
    return re.compile(rf"(?<![\w./:<~-])(?:/(?:{roots})(?=/)|~(?=/)|\.\.(?=/)){_END}*")


def machine_folders(run: Path | None = None) -> list[str]:
    """Return the folders of this process whose paths must not leave the machine, the longest first."""
    folders = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *([run, run.resolve()] if run else [])}
    named = {os.path.abspath(folder) for folder in folders}
    return sorted(named - {"/"}, key=len, reverse=True)


def without_paths(text: str, run: Path | None = None) -> str:
    """Return a text in which only the last name of each path of this machine is left.

    Args:
        run: a run folder; its path and those of the working and home folder may contain spaces.
    """
    for folder in machine_folders(run):
        if " " in folder:
            text = text.replace(folder, folder.replace(" ", "_"))
    return _pattern().sub(lambda found: found[0].rstrip("/").rsplit("/", 1)[-1].replace("..", "."), text)


def left_paths(text: str, run: Path | None = None) -> list[str]:
    """Return the folders of this process that a text still names."""
    return [folder for folder in machine_folders(run) if re.search(rf"(?<![\w.]){re.escape(folder)}/", text)]
