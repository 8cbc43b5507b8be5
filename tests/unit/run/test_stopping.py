"""Test the signals and files that tell a run to stop."""

import os
import signal

import pytest

from zerotune.errors import Interrupted, Preempted
from zerotune.run.stopping import StopSignal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@pytest.fixture(autouse=True)
def own_handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signals_are_noted(number):
    stop = StopSignal()
    assert stop.name is None
    os.kill(os.getpid(), number)
    assert stop.name == number.name
    assert type(stop.stopped("stopped by {name}")) is Preempted


def test_under_nohup_a_closed_terminal_stops_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.name is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_ctrl_c_ends_at_once_where_nothing_can_be_saved():
    StopSignal()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_first_ctrl_c_saves_and_the_second_ends_at_once():
    stop = StopSignal()
    stop.can_save = True
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.name == "SIGINT"
    found = stop.stopped("stopped by {name} after step 3")
    assert isinstance(found, Interrupted) and str(found) == "stopped by SIGINT after step 3"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("kind", ["file", "empty", "folder"])
def test_the_stop_file_is_a_signal_too(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("ZEROTUNE_STOP_FILE", str(tmp_path / "stop"))
    monkeypatch.setattr("zerotune.run.stopping.SECONDS_BETWEEN_LOOKS", 0)
    stop = StopSignal()
    assert stop.name is None
    if kind == "folder":
        (tmp_path / "stop").mkdir()
    else:
        (tmp_path / "stop").write_text("SIGUSR1\n" if kind == "file" else "")
    name = "SIGUSR1" if kind == "file" else "the file stop (ZEROTUNE_STOP_FILE)"
    way_out = "the same command resumes there" if kind == "file" else "delete it, and the same command resumes"
    assert stop.name == name
    assert str(stop.stopped("stopped by {name}: {way_out}")) == f"stopped by {name}: {way_out}"
    monkeypatch.setattr("zerotune.run.stopping.on_all_ranks", lambda accelerator, name: [None, name])
    with pytest.raises(Preempted) as stopped:
        stop.raise_when_noted(None, "preparation")
    assert str(stopped.value) == f"stopped by {name} during preparation: {way_out}"
    monkeypatch.setenv("RANK", "1")
    assert StopSignal().name is None  # rank 0 checks for all
