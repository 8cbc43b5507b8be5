"""What tells a run to stop."""

import os
import signal

from zerotune.run.stopping import StopSignal


def test_signals_are_noted():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        for number in before:
            stop = StopSignal()
            assert stop.name is None
            os.kill(os.getpid(), number)
            assert stop.name == number.name
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_stop_file_is_a_signal_too(tmp_path, monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.setenv("ZEROTUNE_STOP_FILE", str(tmp_path / "stop"))
    monkeypatch.setattr("zerotune.run.stopping.SECONDS_BETWEEN_LOOKS", 0)
    try:
        stop = StopSignal()
        assert stop.name is None
        (tmp_path / "stop").write_text("SIGUSR1\n")
        assert stop.name == "SIGUSR1"
        monkeypatch.setenv("RANK", "1")
        assert StopSignal().name is None  # rank 0 looks for all
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
