"""Test foreign code in a child process: its result or error arrives, and it cannot exceed any limit."""

import os
import time

import pytest

from zerotune.run import bounded
from zerotune.run.bounded import OverLimit, call_bounded


def test_a_result_and_an_error_arrive():
    assert call_bounded(lambda: "x" * 10**6) == "x" * 10**6
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        call_bounded(lambda: 1 / 0)


def test_an_error_that_cannot_be_sent_arrives_by_its_name():
    class Odd(Exception):
        pass

    def fail():
        raise Odd("well")

    with pytest.raises(RuntimeError, match="Odd: well"):
        call_bounded(fail)


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda: os._exit(3), "ends the process that runs it"),
        (lambda: time.sleep(60), "takes more than 1 s"),
        (lambda: bytes(2 * 2**30), "takes more than 1 GiB"),
    ],
)
def test_a_child_that_dies_waits_or_grows_is_ended(function, problem, monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 1)
    with pytest.raises(OverLimit, match=problem):
        call_bounded(function)
