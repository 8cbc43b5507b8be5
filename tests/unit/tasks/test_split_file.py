"""Test split.json: its hash distinguishes the test items of one source from those of another."""

from zerotune.tasks.split_file import reporting_sha256


def test_items_that_are_drawn_from_a_pool_are_told_by_all_of_it():
    def pooled(**hashes):
        return reporting_sha256({"sources": {name: {"sha256": value} for name, value in hashes.items()}})

    assert pooled(train="a", test="b") == "b" and pooled(train="a") == "a"
    assert pooled(train="a", more="b") != pooled(train="a", more="c")
