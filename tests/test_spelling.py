"""Numbers as people write them."""

import pytest

from lora_squeeze.spelling import percent, read_numbers, spell


@pytest.mark.parametrize(
    ("value", "spelled"),
    [(0.5, "0.5"), (1.0, "1"), (0.1 + 0.2, "0.3"), (0.9999999, "0.9999999"), (1e-7, "1e-07"), (3, "3")],
)
def test_a_number_has_the_digits_that_were_meant(value, spelled):
    assert spell(value) == spelled
    assert float(spelled) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("share", "said"), [(0.57, "57%"), (0.985, "98.5%"), (0.9999999, "99.99999%"), (1, "100%")])
def test_a_share_in_percent(share, said):
    assert percent(share) == said


def test_numbers_are_read_back():
    assert read_numbers("0.5,0.25") == (0.5, 0.25)
    assert read_numbers("1") == (1.0,)


@pytest.mark.parametrize("text", ["", "0.5;0.25", "0.5,", "half"])
def test_what_is_no_list_of_numbers_is_refused(text):
    with pytest.raises(ValueError, match="could not convert"):
        read_numbers(text)
