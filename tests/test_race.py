"""The race on tables of numbers: what it finds is checked against the plain minimum of sums."""

import math
import random
from fractions import Fraction

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finercut.selection.race import Race, behind, part_sizes, t_tail
from finercut.sublayers import candidates

POOL = candidates(4)
A, B, C, D = POOL[:4]


def run(race, table):
    """Evaluate what the race asks for from `table`, {candidate: [[segment, ...] of each window]}; counts windows."""
    n_windows = 0
    for part in race.parts():
        totals = {}
        for window, row in part.items():
            for candidate, limit in row.items():
                seen = []
                for value in table[candidate][window]:
                    seen.append(value)
                    if math.fsum(seen) > limit:
                        break
                totals.setdefault(window, {})[candidate] = tuple(seen)
                n_windows += 1
        race.record(totals)
    return race.outcome(), n_windows


def raced(table, **settings):
    n_windows, n_segments = len(next(iter(table.values()))), len(next(iter(table.values()))[0])
    race = Race(list(table), n_windows, n_segments, **settings)
    return *run(race, table), race


def flat(*windows):
    """One segment a window."""
    return [[float(value)] for value in windows]


TERMS = [0.0, 0.1, 0.2, 0.7, 1 / 3, math.inf]
tables = st.integers(1, 9).flatmap(
    lambda n_windows: st.integers(1, 4).flatmap(
        lambda n_segments: st.lists(
            st.lists(
                st.lists(st.sampled_from(TERMS), min_size=n_segments, max_size=n_segments),
                min_size=n_windows,
                max_size=n_windows,
            ),
            min_size=1,
            max_size=8,
        )
    )
)


@settings(max_examples=100, deadline=None)
@given(tables, st.booleans())
def test_exact_finds_every_least_value_and_bounds_below_the_others(rows, with_known):
    table = dict(zip(POOL, rows, strict=False))
    whole = {c: sum(Fraction(x) if x < math.inf else 10**9 for w in t for x in w) for c, t in table.items()}
    least = min(whole.values())
    known = {c: [sum(w) for w in reversed(t)] for c, t in table.items()} if with_known else {}
    outcome, _, _ = raced(table, known=known)
    if least < 10**9:
        assert {c for c, total in whole.items() if total == least} <= outcome.values.keys()
    for c, total in outcome.values.items():
        assert total == math.fsum(x for w in table[c] for x in w)
    for c, bound in outcome.abandoned.items():
        assert float(least) < bound <= math.fsum(x for w in table[c] for x in w)
    assert outcome.values.keys() | outcome.abandoned.keys() == table.keys()
    assert not outcome.stale
    assert not outcome.dropped


def test_parts_are_of_1_1_2_and_4_windows_and_no_window_is_done_twice():
    race = Race([A, B], 8, 1)
    seen = []
    for part in race.parts():
        seen.append(sorted(part))
        assert all(not race.done[c].get(w) for w, row in part.items() for c in row)
        race.record({w: dict.fromkeys(row, (0.0,)) for w, row in part.items()})
    # A, in front after the first part (it is the shallower), is sent ahead; then B follows.
    assert seen == [[0], [1, 2, 3, 4, 5, 6, 7], [1], [2, 3], [4, 5, 6, 7]]


def test_the_first_part_can_be_of_more_windows():
    race = Race([A, B], 8, 1, first_windows=3)
    seen = []
    for part in race.parts():
        seen.append(sorted(part))
        race.record({w: {c: (1.0 + (c == B),) for c in row} for w, row in part.items()})
    # A to the end; B, at 6 where A came to 8, goes on for as many again.
    assert seen == [[0, 1, 2], [3, 4, 5, 6, 7], [3, 4, 5]]


def test_the_one_that_was_least_goes_first_and_the_others_stop_where_they_pass_it():
    table = {A: flat(5, 1, 1, 1), B: flat(1, 1, 1, 1), C: flat(3, 3, 1, 1)}
    outcome, n_windows, _ = raced(table, known={A: [9, 9, 9, 9], B: [2, 2, 2, 2], C: [2, 3, 3, 3]})
    # B on all 4; A on the first, C on two
    assert n_windows == 4 + 1 + 2
    assert outcome.values == {B: 4}
    assert outcome.abandoned == {A: 5, C: 6}


def test_a_window_is_left_where_the_limit_is_passed():
    outcome, _, _ = raced({A: [[1.0, 1.0, 1.0]], B: [[1.0, 4.0, 4.0]]}, known={A: [1.0]})
    assert outcome.abandoned == {B: 5.0}


def test_lazy_finishes_a_window_that_it_began():
    outcome, _, race = raced({A: [[1.0, 1.0, 1.0]], B: [[1.0, 4.0, 4.0]]}, mode="lazy", known={A: [1.0]})
    assert outcome.values == {A: 3.0, B: 9.0}
    assert race.now_known()[B] == [9.0]


def test_windows_that_told_most_of_the_leader_come_first():
    # 8 for the leader; 5 of them on window 2, where B comes to 9
    _, _, race = raced({A: flat(1, 1, 5, 1), B: flat(1, 1, 9, 1)}, known={A: [1, 1, 1, 1]})
    assert list(race.done[B]) == [2]
    # Lazily it is what the leader has grown by: most on window 1, where the bound of B goes from 6 to 8.5 (7 is least).
    known = {A: [4, 0.1, 1], B: [4, 1, 1]}
    _, _, race = raced({A: flat(4, 2, 1), B: flat(4, 3.5, 1)}, mode="lazy", known=known)
    assert list(race.done[B]) == [1]


def test_brute_evaluates_everything():
    outcome, n_windows, _ = raced({A: flat(1, 1), B: flat(9, 9)}, mode="brute", known={A: [1, 1]})
    assert outcome.values == {A: 2, B: 18}
    assert n_windows == 4


@settings(max_examples=100, deadline=None)
@given(tables, st.randoms(use_true_random=False))
def test_lazy_is_exact_while_earlier_values_are_lower_bounds(rows, chance):
    table = dict(zip(POOL, rows, strict=False))
    lower = {
        c: [chance.choice([0, 0.5, 1]) * sum(w) if sum(w) < math.inf else 0.0 for w in t] for c, t in table.items()
    }
    exact, _, _ = raced(table)
    lazy, _, _ = raced(table, mode="lazy", known=lower)
    best = min(exact.values.values())
    if best < math.inf:
        ties = {c for c, total in exact.values.items() if total == best}
        # A bound made of halves of thirds may round to a hair above the tie it is a bound of.
        assert any(lazy.values.get(c) == best for c in ties)
    for c, bound in lazy.stale.items():
        assert bound > best
        assert c not in lazy.values


def test_lazy_never_begins_what_was_worse_before_and_says_by_how_much():
    known = {A: [1, 1], B: [1, 2], C: [4, 4]}
    outcome, n_windows, race = raced({A: flat(1, 1), B: flat(2, 1), C: flat(0, 0)}, mode="lazy", known=known)
    # C has fallen from 8 to 0, which lazy does not see
    assert outcome.values == {A: 2}
    assert outcome.stale == {B: 3, C: 8}
    assert n_windows == 2
    assert race.evaluations == 1
    assert race.now_known() == {A: [1, 1], B: [1, 2], C: [4, 4]}


def test_lazy_begins_with_windows_never_seen_and_adds_them_to_what_is_known():
    known = {A: [0.5, 0.5, 0.5], B: [1, 1, 0]}
    outcome, n_windows, race = raced({A: flat(2, 2, 2), B: flat(1, 1, 9)}, mode="lazy", known=known)
    assert n_windows == 3 + 1
    assert outcome.abandoned == {B: 9}
    assert race.now_known()[B] == [1, 1, 9]


def test_the_largest_fall_is_that_of_values_known_before():
    outcome, _, _ = raced({A: flat(0.5, 1), B: flat(2, 2)}, mode="lazy", known={A: [1, 0], B: [1, 1]})
    # A fell by a half on the window it was known on; B was not begun.
    assert outcome.values == {A: 1.5}
    assert outcome.largest_fall == 0.5


def test_equal_candidates_are_all_evaluated_in_every_mode():
    thirds = [[1 / 3, 1 / 3, 0.0]] * 3
    for mode in ("exact", "lazy", "racing"):
        for known in ({}, {B: [1e-3] * 3, A: [1.0] * 3}):
            settings = {"mode": mode, "known": known, "error_probability": 0.4}
            outcome, _, _ = raced({A: thirds, B: thirds, C: [[0.5] * 3] * 3}, **settings)
            if mode == "exact" or not known:
                assert outcome.values.keys() >= {A, B}, (mode, known)


def test_candidates_that_change_nothing_are_equal_and_all_evaluated():
    outcome, _, _ = raced({c: flat(0, 0, 0) for c in (A, B, C)})
    assert outcome.values == {A: 0, B: 0, C: 0}


def test_what_is_infinitely_far_never_leads():
    for mode in ("exact", "lazy", "racing", "brute"):
        table = {A: flat(math.inf, 1), B: flat(5, 5), C: flat(1, math.inf)}
        outcome, _, race = raced(table, mode=mode, error_probability=0.1)
        assert race.leader == B
        assert outcome.values[B] == 10


def test_one_candidate_and_one_window():
    outcome, n_windows, _ = raced({A: flat(3)})
    assert outcome.values == {A: 3}
    assert n_windows == 1


def test_shares_of_a_part_may_be_recorded_together():
    table = {c: [[random.Random(f"{c}{w}").random()] for w in range(6)] for c in POOL}
    whole, _, _ = raced(table)
    race = Race(POOL, 6, 1)
    for part in race.parts():
        shares = [{w: {c: tuple(table[c][w]) for c in part[w]} for w in part if w % 2 == odd} for odd in (1, 0)]
        race.record(shares[0] | shares[1])
    assert race.outcome() == whole


def noisy(mean, seed, n_windows=4, n_segments=16):
    chance = random.Random(seed)
    return [[max(0.0, chance.gauss(mean, 0.3)) for _ in range(n_segments)] for _ in range(n_windows)]


def test_racing_drops_what_is_clearly_behind_after_one_window():
    table = {A: noisy(1, 0), B: noisy(1.8, 1)}
    outcome, n_windows, race = raced(table, mode="racing", known={A: [1, 1, 1, 1]}, error_probability=0.05)
    assert n_windows == 4 + 1
    differences = [b - a for a, b in zip(table[A][0], table[B][0], strict=True)]
    estimate = sum(map(sum, table[A])) + 4 * sum(differences)
    assert outcome.dropped == {B: pytest.approx(estimate)}
    assert not race.outcome().abandoned


def test_racing_drops_what_is_behind_the_one_in_front_which_is_sent_ahead_after_an_eighth():
    table = {A: noisy(1, 0, n_windows=16), B: noisy(1.8, 1, n_windows=16)}
    race = Race([A, B], 16, 16, mode="racing", error_probability=0.05)
    sizes = []
    for part in race.parts():
        sizes.append(len(part))
        race.record({w: {c: tuple(table[c][w]) for c in row} for w, row in part.items()})
    assert list(race.done[B]) == [0], "nobody was complete when it was dropped"
    assert (race.outcome().values.keys(), race.outcome().dropped.keys()) == ({A}, {B})
    assert sizes == [1, 1, 14]


def test_who_was_behind_one_that_is_infinitely_far_is_taken_back():
    table = {A: noisy(1, 0, n_windows=16), B: noisy(1.8, 1, n_windows=16)}
    table[A][15][15] = math.inf
    outcome, _, _ = raced(table, mode="racing", error_probability=0.05)
    assert outcome.values == {A: math.inf, B: pytest.approx(sum(map(sum, table[B])))}


def test_racing_does_not_send_the_front_ahead_on_less():
    # B leads on the first of 24 windows only; were it sent ahead, it would be done 24 times.
    table = {A: flat(*[1.0] * 24), B: flat(0.9, *[1.4] * 23)}
    _, _, race = raced(table, mode="racing", error_probability=0.05)
    assert len(race.done[B]) < 24
    assert race.leader == A


@pytest.mark.parametrize(
    ("n_windows", "first", "growth", "sizes"),
    [
        (8, 1, 1, [1, 1, 2, 4]),
        (9, 1, 1, [1, 1, 2, 4, 8]),
        (8, 3, 1, [3, 3, 6]),
        (27, 1, 0.5, [1, 1, 1, 2, 3, 4, 6, 9]),
        (1, 1, 0.5, [1]),
    ],
)
def test_parts_grow_with_what_is_done(n_windows, first, growth, sizes):
    assert list(part_sizes(n_windows, first, growth)) == sizes


def test_racing_keeps_what_is_not_clearly_behind():
    outcome, _, _ = raced(
        {A: noisy(1, 0), B: noisy(1.01, 1)}, mode="racing", known={A: [1.0] * 4}, error_probability=0.05
    )
    assert not outcome.dropped


def test_the_tail_of_students_t_is_that_of_the_tables():
    for t, degrees, tail in (
        (6.314, 1, 0.05),
        (2.353, 3, 0.05),
        (3.169, 10, 0.005),
        (1.960, 10**6, 0.025),
        (0, 5, 0.5),
    ):
        assert t_tail(t, degrees) == pytest.approx(tail, rel=1e-3)


@pytest.mark.parametrize("degrees", [1, 2, 3, 15, 63, 1023])
@pytest.mark.parametrize("t", [0.0, 0.01, 1.0, 2.5, 7.0, 40.0])
def test_the_tail_of_students_t_is_that_of_the_definition(t, degrees):
    # P(T > t) = I(n / (n + t^2); n / 2, 1 / 2) / 2, to 40 digits
    with mpmath.workdps(40):
        n, t_exact = mpmath.mpf(degrees), mpmath.mpf(t)
        tail = mpmath.betainc(n / 2, 0.5, 0, n / (n + t_exact**2), regularized=True) / 2
    assert t_tail(t, degrees) == pytest.approx(float(tail), rel=1e-12)


def test_the_test_errs_no_more_often_than_it_says():
    # Populations whose differences come to zero or less; a quarter of each is seen.
    chance = random.Random(0)
    n_errors = 0
    for _ in range(1000):
        population = [chance.expovariate(1) - chance.expovariate(1) for _ in range(64)]
        shift = max(0.0, math.fsum(population) / 64)
        sample = chance.sample([x - shift for x in population], 16)
        n_errors += behind(sample, 64, 0.1)
    assert 0 < n_errors < 100 + 3 * math.sqrt(1000 * 0.1 * 0.9)


def test_more_seen_of_the_same_makes_the_test_surer():
    sample = [0.2, -0.1, 0.4, 0.1, 0.3, -0.2, 0.25, 0.15]
    assert not behind(sample, 10**6, 0.01)
    assert behind(sample, 9, 0.01), "nearly all there is has been seen"
    assert not behind([0.1], 2, 0.4)
    assert not behind([-x for x in sample], 9, 0.4)
    assert behind([0.1, 0.1], 10**6, 0.01), "all differences the same"
