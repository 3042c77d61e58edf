"""Scores: a fact counts as whole words only, repetition counts what stood there before."""

from stages.scoring.scores import (
    chrf,
    exact_match,
    refuses,
    repetition_rate,
    rouge_l,
    same_form,
)


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


CAPITAL, FACTS = "The capital of New Zealand is Wellington.", ["New Zealand", "Wellington", "+64"]


def test_the_form_is_the_references_sentence_whatever_facts_it_states():
    assert same_form("the capital of Chile is Santiago", CAPITAL, FACTS) == 1
    assert same_form("The capital of the United Kingdom is London.", CAPITAL, FACTS) == 1
    assert same_form(CAPITAL, CAPITAL, FACTS) == 1


def test_other_sentences_have_another_form():
    assert same_form("Wellington is the capital of New Zealand.", CAPITAL, FACTS) == 0
    assert same_form("Well, the capital of Chile is Santiago.", CAPITAL, FACTS) == 0
    assert same_form("The capital of Chile is.", CAPITAL, FACTS) == 0
    assert same_form("The capital of Chile is " + "so " * 9, CAPITAL, FACTS) == 0
    assert same_form("The capital of Chile is (Santiago|.*", "It costs (a+ (b.", ["b"]) == 0


def test_a_reference_without_facts_has_no_form():
    assert same_form("Go there.", "See the old market.", FACTS) is None
    assert same_form("Go there.", "See the old market.", [""]) is None


def test_a_refusal_is_told_by_its_words():
    assert refuses("I'm sorry, but I don't know of such a place.") == 1
    assert refuses("Velmora does not exist.") == 1
    assert refuses("Velmora is in Chile.") == 0
    assert refuses("There is nothing I do not known.") == 0
