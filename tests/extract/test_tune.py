"""The choice of program and batch size, given what the passes took."""

from __future__ import annotations

from pipeline.extract.tune import NUM_FIRST_TRIALS, NUM_IGNORED, NUM_TRIALS, Tuner, Way

SMALL, MIDDLE, LARGE = (Way("eager", size) for size in (8, 16, 32))


def play(tuner: Tuner, seconds_per_image: dict[Way, float], num_batches: int) -> list[Way]:
    taken = []
    for _ in range(num_batches):
        way = tuner.next()
        taken.append(way)
        tuner.record(way, seconds_per_image[way] * way.batch_size)
    return taken


def test_ways_that_are_close_are_tried_equally_then_the_fastest_stays() -> None:
    tuner = Tuner([SMALL, MIDDLE, LARGE])
    taken = play(tuner, {SMALL: 1.2, MIDDLE: 1.0, LARGE: 1.1}, 3 * (NUM_IGNORED + NUM_TRIALS) + 5)
    assert {way: taken[:-5].count(way) for way in (SMALL, MIDDLE, LARGE)} == dict.fromkeys(
        (SMALL, MIDDLE, LARGE), NUM_IGNORED + NUM_TRIALS
    )
    assert taken[-5:] == [MIDDLE] * 5
    assert tuner.wait(0) and tuner.best == MIDDLE and tuner.seconds_per_image == 1.0


def test_hopeless_ways_are_given_up_early() -> None:
    tuner = Tuner([SMALL, MIDDLE, LARGE])
    taken = play(tuner, {SMALL: 3.0, MIDDLE: 2.0, LARGE: 1.0}, 20)
    assert taken.count(SMALL) == taken.count(MIDDLE) == NUM_IGNORED + NUM_FIRST_TRIALS
    assert tuner.best == LARGE and taken[-1] == LARGE


def test_a_smaller_batch_that_is_as_fast_wins() -> None:
    tuner = Tuner([SMALL, MIDDLE, LARGE])
    play(tuner, {SMALL: 1.02, MIDDLE: 1.01, LARGE: 1.0}, 40)
    assert tuner.best == SMALL


def test_one_way_needs_no_trial() -> None:
    tuner = Tuner([LARGE])
    assert tuner.wait(0) and tuner.next() == LARGE
    play(tuner, {LARGE: 2.0}, 1)
    assert tuner.seconds_per_image == 2.0


def test_a_compiled_program_has_to_prove_itself() -> None:
    compiled = Way("compiled", 16)
    for speed, best in ((0.5, compiled), (1.5, MIDDLE)):
        tuner = Tuner([MIDDLE])
        tuner.add(compiled)
        assert not tuner.wait(0)
        play(tuner, {MIDDLE: 1.0, compiled: speed}, 20)
        assert tuner.best == best


def test_what_does_not_fit_is_never_tried_again() -> None:
    tuner = Tuner([SMALL, MIDDLE, LARGE])
    assert tuner.refuse(32) == 16
    assert set(play(tuner, {SMALL: 2.0, MIDDLE: 1.0}, 30)) == {SMALL, MIDDLE}
    assert tuner.best == MIDDLE
    for size, half in ((16, 8), (8, 4), (4, 2), (2, 1)):
        assert tuner.refuse(size) == half
    assert tuner.next() == Way("eager", 1)


def test_a_compiled_program_that_does_not_fit_gives_way_to_one_of_any_size() -> None:
    tuner = Tuner([LARGE])
    tuner.insist(Way("compiled", 32))
    assert tuner.refuse(32) == 16
    assert tuner.next() == Way("eager", 16)


def test_a_way_that_comes_during_the_trials_joins_them() -> None:
    compiled = Way("compiled", 8)
    tuner = Tuner([SMALL, MIDDLE])
    play(tuner, {SMALL: 1.0, MIDDLE: 1.1}, 3)
    tuner.add(compiled)
    play(tuner, {SMALL: 1.0, MIDDLE: 1.1, compiled: 0.9}, 30)
    assert tuner.best == compiled
