"""Scores: a fact counts as whole words only, repetition counts what stood there before."""

from stages.scoring.scores import chrf, exact_match, repetition_rate, rouge_l


def test_a_fact_counts_anywhere_in_the_answer_whatever_its_case():
    assert exact_match("It is the JAPANESE yen.", "Japanese yen", "") == 1
    assert exact_match("Dial +81 first", "+81", "") == 1


def test_a_part_of_a_word_is_no_match():
    assert exact_match("Dial +12 first", "+1", "") == 0
    assert exact_match("The time zone is Europe/Rome.", "Rome", "") == 0


def test_without_a_fact_the_whole_answer_counts():
    assert exact_match("Go to the park!", None, "go to the park") == 1
    assert exact_match("Go to the park and swim", None, "go to the park") == 0


def test_the_same_text_scores_highest():
    assert rouge_l("a b c", "a b c") == 1
    assert chrf("a b c d", "a b c d") == 100


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert repetition_rate(range(10)) == 0
    assert repetition_rate([1, 2, 3, 4] * 3) > 0.5
    assert repetition_rate([1]) == 0
