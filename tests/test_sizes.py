"""Sizes as people write them."""

import pytest

from lora_squeeze.sizes import bytes_text, read_size


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (19_400_000, "19.4 MB"), (3.2e12, "3200.0 GB")]
)
def test_sizes_as_people_write_them(count, shown):
    assert bytes_text(count) == shown


@pytest.mark.parametrize(
    ("text", "size"),
    [("20", 20), ("20MB", 20_000_000), ("1.5 kb", 1500), ("2GiB", 2 * 2**30), (".5KB", 500), ("7 B", 7)],
)
def test_sizes_are_read(text, size):
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "1.2.3", ".", "-5", "5 lightyears"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011
        read_size(text)
