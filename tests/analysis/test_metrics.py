"""Scores of captions: known values, several references, and what is refused before anything is generated."""

from __future__ import annotations

import sys

import pytest

from genlip_mlx.analysis.metrics import Field, MetricError, check, score

REFERENCES = [
    ["A red circle on a blue square.", "There is a red circle."],
    ["The receipt says: TOTAL 12.50 in black ink."],
    ["Three green diamonds stand in one row."],
]


def test_what_a_person_wrote_is_perfect() -> None:
    scores = score([texts[0] for texts in REFERENCES], REFERENCES[:1] + REFERENCES[1:])
    assert scores.captions == 3
    assert scores.bleu == pytest.approx(100)
    assert (scores.character_error_rate, scores.word_error_rate) == (0, 0)
    alone = score([texts[0] for texts in REFERENCES], [texts[:1] for texts in REFERENCES])
    assert alone.cider == pytest.approx(10)
    # CIDEr is the mean over references, and the second one of the first picture is said otherwise.
    assert scores.cider is not None
    assert 8 < scores.cider < 10


def test_cider_knows_no_case_and_no_punctuation() -> None:
    plain = [" ".join(texts[0].lower().rstrip(".").replace(":", "").split()) for texts in REFERENCES]
    assert score(plain, [texts[:1] for texts in REFERENCES]).cider == pytest.approx(10)


def test_error_rates_count_edits_over_all_references() -> None:
    # One word and two characters wrong; words 1 of 4 + 2, characters 2 of 15 + 7.
    scores = score(["a red  sqXXre on", "hi there"], [["a red square on"], ["no", "hi there"]])
    assert scores.word_error_rate == pytest.approx(1 / 6)
    assert scores.character_error_rate == pytest.approx(2 / 23)


def test_silence_is_all_wrong() -> None:
    scores = score(["", ""], [["one two three four"], ["five six seven eight"]])
    assert (scores.bleu, scores.cider) == (0, 0)
    assert (scores.character_error_rate, scores.word_error_rate) == (1, 1)


def test_a_single_picture_has_no_cider() -> None:
    assert score(["a cat"], [["a cat"]]).cider is None
    assert score(["...", "!"], [["?"], ["..."]]).cider is None


def test_fields() -> None:
    total, words = Field.parse("total=TOTAL ([0-9.]+)"), Field.parse("first=^[a-z]+")
    said = ["TOTAL 1.20", "sum TOTAL 3.00", "nothing", "TOTAL 9"]
    right = [["TOTAL 1.20 or so"], ["TOTAL 3.10", "the TOTAL 3.00"], ["TOTAL 5"], ["no such line"]]
    fields = score(said, right, [total, words]).fields
    assert (fields["total"].exact_match, fields["total"].captions) == (pytest.approx(2 / 3), 3)
    assert fields["first"].captions == 2  # two references start with a small letter
    assert Field.parse("a=(x)|y=z").value("y=z") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("total", "'total' is no field; write NAME=REGEX"),
        ("=x", "'=x' is no field"),
        ("total=", "'total=' is no field"),
        ("total=(", "field total: '(' is no regular expression (missing )"),
    ],
)
def test_fields_that_are_none(text: str, message: str) -> None:
    with pytest.raises(MetricError) as error:
        Field.parse(text)
    assert message in str(error.value)


def test_a_field_that_no_reference_states() -> None:
    with pytest.raises(MetricError, match=r"field tax: 'TAX' is found in none of the references, such as 'A red"):
        check(REFERENCES, [Field.parse("tax=TAX")])


@pytest.mark.parametrize("library", ["jiwer", "sacrebleu.metrics", "pycocoevalcap.cider.cider_scorer"])
def test_a_missing_library(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MetricError, match=r'need the extra "evaluate" .*pip install "genlip-mlx\[evaluate\]"'):
        check(REFERENCES)
