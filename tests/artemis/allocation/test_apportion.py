"""Whole units given out: against textbook cases and by hand."""

from artemis.allocation.apportion import Claim, apportion, parts


def test_equal_scores_give_the_uniform_configuration():
    claims = [Claim(0.2, 5, 4, 32, 8), Claim(0.2, 7, 32, 256, 64), Claim(0.2, 3, 4, 32, 8)]
    assert apportion(claims, 8 * 5 + 64 * 7 + 8 * 3) == [8, 64, 8]


def test_it_is_websters_method():
    """A textbook's seven seats; the method of d'Hondt would give 4, 2, 1."""
    claims = [Claim(votes, 1, 0, 7, 1) for votes in (53, 24, 23)]
    assert apportion(claims, 7) == [3, 2, 2]


def test_equal_bids_go_to_the_smaller_share_and_then_to_the_first():
    """A module of usual size 8 and one of 4 with twice its score bid the same at each size."""
    half, full = Claim(1.0, 1, 1, 9, 8), Claim(2.0, 1, 1, 9, 4)
    assert apportion([full, half], 3) == [1, 2]
    assert apportion([half, half], 3) == [2, 1]


def test_sizes_follow_scores_within_bounds():
    claims = [Claim(score, 1, 1, 20, 8) for score in (0.1, 0.2, 0.3, 0.0, 5.0)]
    assert apportion(claims, 1 + 20 + 30) == [5, 10, 15, 1, 20]


def test_nothing_that_fits_is_left_unspent():
    claims = [Claim(0.5, 7, 1, 9, 4), Claim(0.3, 5, 1, 9, 4), Claim(0.2, 11, 1, 9, 4)]
    for budget in range(23, 23 * 9):
        found = apportion(claims, budget)
        left = budget - sum(c.cost * n for c, n in zip(claims, found, strict=True))
        assert left >= 0
        assert all(left < c.cost for c, n in zip(claims, found, strict=True) if n < c.most)


def test_parts_of_a_budget_are_in_proportion_within_bounds():
    """Two kinds of one module each, whose usual sizes cost 100 and 300."""
    small, large = [Claim(1.0, 1, 20, 150, 100)], [Claim(1.0, 3, 10, 200, 100)]
    expected = {
        400: [100, 300], 200: [50, 150],
        60: [20, 40], 640: [150, 490], 750: [150, 600], 10: [20, 30],
    }  # fmt: skip
    for budget, wanted in expected.items():
        assert parts([small, large], budget) == wanted
