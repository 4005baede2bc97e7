"""One tree of errors; each is also the builtin that a caller would catch."""

from __future__ import annotations

import inspect
import pickle

import pytest

from nemologger import errors

BUILTINS = {
    "ConfigurationError": ValueError,
    "LoggerMisconfigurationError": ValueError,
    "CheckpointMisconfigurationError": ValueError,
    "NotFoundError": FileNotFoundError,
    "CheckpointError": RuntimeError,
    "UnfinishedCheckpointError": ValueError,
    "DamagedCheckpointError": RuntimeError,
    "SaveFailedError": OSError,
    "ModelMismatchError": RuntimeError,
    "DirectoryInUseError": BlockingIOError,
    "RunCompletedError": ValueError,
    "ContextError": ValueError,
    "RefusedError": PermissionError,
    "RankError": RuntimeError,
    "SilentRankError": TimeoutError,
    "SweepError": RuntimeError,
}
ALL = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}


def test_these_are_all():
    assert set(ALL) == {*BUILTINS, "NemologgerError"}


@pytest.mark.parametrize("name", sorted(ALL))
def test_each_belongs_to_the_tree_and_is_drawn_in_it(name):
    assert issubclass(ALL[name], errors.NemologgerError)
    assert name in errors.__doc__


@pytest.mark.parametrize(("name", "builtin"), sorted(BUILTINS.items()))
def test_each_is_the_builtin_one_would_catch(name, builtin):
    with pytest.raises(builtin, match="what to do"):
        raise ALL[name]("what happened, what to do")


@pytest.mark.parametrize("name", sorted(ALL))
def test_each_takes_one_message_and_travels_by_value(name):
    error = ALL[name]("a message: with 'quotes'\nand lines")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) == "a message: with 'quotes'\nand lines"


def test_what_is_wrong_with_a_checkpoint_can_be_caught_as_one():
    for name in ("UnfinishedCheckpointError", "DamagedCheckpointError", "SaveFailedError", "ModelMismatchError"):
        assert issubclass(ALL[name], errors.CheckpointError)
