"""Files are written whole or not at all, with the umask's modes; test full disks too."""

import errno
import os
import stat
from types import SimpleNamespace

import pytest

from zerotune.files import disk_is_full, follow_umask, full_disk_refusal, write_text


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_file_gets_the_mode_that_the_umask_asks_for(tmp_path, mask, mode):
    file = tmp_path / "weights"
    before = os.umask(mask)
    try:
        file.touch()
        file.chmod(0o600)
        follow_umask(file)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == mode


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk full: .* has [0-9]+ MiB free"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk quota exceeded"),
        (OSError(errno.EFBIG, "File too large"), "file too large: .*ulimit -f"),
    ],
)
def test_what_is_exhausted_is_named(tmp_path, error, words):
    assert disk_is_full(tmp_path, error)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(full_disk_refusal(tmp_path, error))


def test_a_disk_without_inodes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_files=10, f_favail=0))
    assert full_disk_refusal(tmp_path, OSError(errno.ENOSPC, "x")).startswith("no free inodes")


def test_a_planted_link_is_not_written_through(tmp_path):
    private, aside = tmp_path / "private", tmp_path / f".run.json.{os.getpid()}"
    private.write_text("mine")
    aside.symlink_to(private)
    write_text(tmp_path / "run.json", "{}")
    assert private.read_text() == "mine" and (tmp_path / "run.json").read_text() == "{}" and not aside.exists()
