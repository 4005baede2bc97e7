"""What a writer says is what rank 0 reads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nemologger.checkpoint.manifest import FileRecord
from nemologger.checkpoint.writing.reports import dumps, loads, merged

RECORDS = st.dictionaries(
    st.text(min_size=1), st.builds(FileRecord, st.integers(0, 2**62), st.lists(st.text("0123456789abcdef")).map(tuple))
)


@given(RECORDS)
def test_a_report_comes_back_as_it_was(records):
    assert loads(dumps(records)) == records


def test_the_files_of_all_ranks_are_put_together():
    one, two = FileRecord(1, ("a",)), FileRecord(2, ("b",))
    assert merged([{"weights/__0_0.distcp": one}, {}, {"weights/__1_0.distcp": two}]) == {
        "weights/__0_0.distcp": one,
        "weights/__1_0.distcp": two,
    }
