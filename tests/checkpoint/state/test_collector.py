"""The collector of garbage is kept away only as long as it is asked to stay away."""

import gc

import pytest

from nemologger.checkpoint.state.collector import without_collector


def test_it_comes_back_and_stays_away_where_it_was_not():
    with without_collector():
        with without_collector():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="lost"), without_collector():
        raise ValueError("lost")
    assert gc.isenabled()
