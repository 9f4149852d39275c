"""What a signal does to a block of code. What it does to a run: `integration/test_stop.py`."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest
from commands import ROOT

from pipeline import stopping
from pipeline.errors import CommitConflict

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_one_raises_and_the_second_one_would_end_us(number: signal.Signals) -> None:
    before = handlers()
    with stopping.stoppable():
        with pytest.raises(KeyboardInterrupt, match=number.name):
            signal.raise_signal(number)
        assert handlers() == [signal.SIG_DFL] * 2
    assert handlers() == before


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_held_back_happens_behind_the_block(fails: bool) -> None:
    done = []

    def commit() -> None:
        with stopping.held_back():
            signal.raise_signal(signal.SIGTERM)
            done.append("the commit")
            if fails:
                raise CommitConflict("another run committed first")

    with stopping.stoppable(), pytest.raises(KeyboardInterrupt):
        commit()
    assert done == ["the commit"]


def test_ray_leaves_a_handler_as_it_was() -> None:
    def ray_init(is_stopped: bool = False) -> None:
        with stopping.despite_ray():
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
            if is_stopped:
                signal.raise_signal(signal.SIGTERM)

    before = handlers()
    with stopping.stoppable():
        ours = handlers()
        ray_init()
        assert handlers() == ours
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            ray_init(is_stopped=True)
        assert handlers() == ours
    assert handlers() == before


def test_other_threads_are_none_of_its_business() -> None:
    before, seen = handlers(), []

    def run() -> None:
        with stopping.stoppable(), stopping.held_back(), stopping.despite_ray():
            seen.extend(handlers())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == before


def test_the_second_one_ends_the_process_even_in_what_is_held_back() -> None:
    code = """if True:
        import signal, time
        from pipeline import stopping
        with stopping.stoppable(), stopping.held_back():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            print("still here")
    """
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "")
