"""Best of N against numbers worked by hand."""

import pytest

from dpo_recipes.models.best_of import best_of


def means(found, size):
    return {way: round(share["mean"], 4) for way, share in found["by_size"][str(size)].items()}


def test_each_way_to_choose_is_the_mean_over_all_choices_of_n_answers():
    """Two questions; of the first the pairs of answers are (0,1), (0,2), (1,2)."""
    scores = [[3.0, 2.0, 1.0], [1.0, 1.0, 0.0]]
    right = [[False, True, True], [True, False, False]]
    votes = [["7", "8", "8"], ["5", "6", None]]
    found = best_of(scores, right, votes, sizes=(1, 2, 3, 4))
    assert list(found["by_size"]) == ["1", "2", "3"]
    # Highest score of two: wrong, wrong, right; (right or wrong), right, wrong. A random answer: 2/3; 1/3.
    assert means(found, 2)["best_of"] == round((1 / 3 + 1.5 / 3) / 2, 4)
    assert means(found, 2)["chance"] == 0.5
    # Votes of two: a tie, a tie, 8; a tie, 5 (None does not vote), 6.
    assert means(found, 2)["majority"] == round(((0.5 + 0.5 + 1) / 3 + (0.5 + 1 + 0) / 3) / 2, 4)
    assert means(found, 2)["oracle"] == round((1 + 2 / 3) / 2, 4)
    assert means(found, 3) == {
        **{"best_of": 0.25, "chance": 0.5, "majority": 0.75, "oracle": 1.0},
        **{"over_chance": -0.25, "over_majority": -0.5},
    }
    assert found["pairs"]["mean"] == pytest.approx((0 + (0.5 + 1) / 2) / 2)
    assert (found["questions"], found["pairs"]["n"]) == (2, 2)
    one = means(found, 1)
    assert one["best_of"] == one["majority"] == one["oracle"] == one["chance"] == 0.5


def test_without_votes_there_is_no_majority_and_without_both_kinds_no_ranking():
    found = best_of([[1.0, 2.0]], [[True, True]])
    assert set(found["by_size"]["2"]) == {"best_of", "chance", "oracle", "over_chance"}
    assert found["pairs"] is None


def test_many_answers_are_drawn_and_come_close_to_all_choices():
    """Of 16 answers the 4 highest are right: the best of 4 is right unless all 4 are among the 12 others."""
    scores = [[float(n) for n in range(16)]] * 40
    right = [[n >= 12 for n in range(16)]] * 40
    found = best_of(scores, right, sizes=(4,))
    exact = 1 - (12 * 11 * 10 * 9) / (16 * 15 * 14 * 13)
    assert found["by_size"]["4"]["best_of"]["mean"] == pytest.approx(exact, abs=0.02)
    assert found["by_size"]["4"]["chance"]["mean"] == pytest.approx(0.25)
    assert found == best_of(scores, right, sizes=(4,))


def test_a_perfect_score_is_the_oracle_and_an_equal_one_is_chance():
    right = [[True, False, False, False], [False, False, True, True]] * 20
    perfect = best_of([[float(mark) for mark in marks] for marks in right], right)["by_size"]["4"]
    assert perfect["best_of"]["mean"] == perfect["oracle"]["mean"] == 1
    assert perfect["over_chance"]["low"] > 0.5
    equal = best_of([[0.0] * 4] * 40, right)["by_size"]["4"]
    assert equal["over_chance"]["low"] == equal["over_chance"]["high"] == 0
