"""Arguments of ModelCheckpoint that cannot work are named, and what has no effect is said."""

from __future__ import annotations

import pytest
from helpers.saved_run import run
from toy import ToyModel

from nemologger import ConfigurationError, ModelCheckpoint


def test_an_argument_that_does_not_exist_is_told_with_the_one_that_was_meant():
    with pytest.raises(TypeError, match="'every_n_train_step'; did you mean 'every_n_train_steps'"):
        ModelCheckpoint(every_n_train_step=5)
    with pytest.raises(TypeError, match=r"'colour'$"):
        ModelCheckpoint(colour="red")


def test_a_template_that_cannot_be_filled_is_an_error_at_once():
    with pytest.raises(ConfigurationError, match=r"\{model_name:d\}"):
        ModelCheckpoint(filename="{model_name:d}")


def test_nemo_1s_arguments_say_what_to_use(caplog):
    ModelCheckpoint(always_save_nemo=True, save_nemo_on_train_end=True, model_parallel_size=2)
    assert len(caplog.records) == 3
    with pytest.raises(TypeError, match="save_topk"):
        ModelCheckpoint(save_topk=3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"save_top_k": "3"}, "save_top_k='3'"),
        ({"save_last": "yes"}, "save_last='yes'"),
        ({"train_time_interval": 60}, "datetime.timedelta"),
        ({"files_per_rank": 0}, "files_per_rank=0"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(options, named):
    with pytest.raises(ConfigurationError, match=named):
        ModelCheckpoint(**options)


def test_a_file_where_the_directory_should_be_is_found_before_training(tmp_path):
    (tmp_path / "file").touch()
    model = ToyModel()
    with pytest.raises(ConfigurationError, match="dirpath="):
        run(tmp_path / "file", 5, model)
    assert model.losses == {}
