"""Test the lock under which DeepSpeed's C++ is compiled."""

import subprocess
import sys

from zerotune.run.build_lock import BuildLock, survive_killed_builds

HOLDER = """
import sys, time
from zerotune.run.build_lock import BuildLock
print(BuildLock(sys.argv[1]).try_acquire(), flush=True)
time.sleep(60)
"""


def test_a_lock_that_a_dead_process_left_is_taken(tmp_path):
    path = tmp_path / "lock"
    path.touch()  # torch's own lock would wait forever
    lock = BuildLock(str(path))
    assert lock.try_acquire()
    lock.release()
    assert not path.exists()
    lock.wait()  # returns at once: nobody holds it


def test_a_lock_ends_with_the_process_that_is_killed(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    lock = BuildLock(str(path))
    assert not lock.try_acquire()
    holder.kill()
    lock.wait()
    assert lock.try_acquire()
    lock.release()
    holder.wait()
    holder.stdout.close()


def test_torch_compiles_under_it(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "FileBaton", cpp_extension.FileBaton)  # restores it after the test
    survive_killed_builds()
    (tmp_path / "lock").touch()
    (tmp_path / "one.cpp").write_text(
        '#include <torch/extension.h>\nPYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.attr("one") = 1; }\n'
    )
    compiled = []
    monkeypatch.setattr(cpp_extension, "_write_ninja_file_and_build_library", lambda **given: compiled.append(given))
    monkeypatch.setattr(cpp_extension, "_import_module_from_library", lambda *given: "module")
    found = cpp_extension.load("zerotune_one", [str(tmp_path / "one.cpp")], build_directory=str(tmp_path))
    assert found == "module" and len(compiled) == 1 and not (tmp_path / "lock").exists()
