"""Find paths of this machine in texts that leave it, and cut them to their last name."""

import os
import re
import tempfile
from pathlib import Path

# Top folders of the paths of users, disks and jobs, on this machine or another.
_ROOTS = (
    "home|Users|root|tmp|var|mnt|data|scratch|work|opt|srv|usr|media|lustre|local|localscratch|lscratch|localdisk|"
    "nvme|raid|project|projects|proj|group|groups|gpfs|nfs|beegfs|ceph|pscratch|ptmp|export|nobackup|users|vol|volumes|"
    "Volumes|storage|shared|workspace|cluster"
)
_END = r"[^\s\"'`<>&|,;:)(\]\[}{]"


def _pattern() -> re.Pattern:
    """Return a pattern of absolute paths, paths from the home folder, and paths that lead out of a folder."""
    roots = "|".join([_ROOTS, *(re.escape(entry.name) for entry in os.scandir("/") if entry.is_dir())])
    # not after a name, a scheme's slashes or a tag's bracket: "and/or", https://host/home/x and </data> stay
    return re.compile(rf"(?<![\w./:<~-])(?:/(?:{roots})(?=/)|~(?=/)|\.\.(?=/)){_END}*")


def machine_folders(run: Path | None = None) -> list[str]:
    """Return the folders of this process whose paths must not leave the machine, the longest first."""
    folders = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *([run, run.resolve()] if run else [])}
    named = {os.path.abspath(folder) for folder in folders}
    return sorted(named - {"/"}, key=len, reverse=True)


def without_paths(text: str, run: Path | None = None) -> str:
    """Return a text with each path of this machine cut to its last name.

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
