"""Contexts that NeMo 2.5 wrote load here."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path

import ctxmod
import fiddle as fdl
import lightning.pytorch as pl
import pytest
import torch
import yaml

import nemologger.trainer
from nemologger.context.model_yaml import to_yaml
from nemologger.errors import ContextError, RefusedError
from nemologger.io import FileArtifact, TrainerContext, load_context

CONTEXTS = Path(__file__).parents[1] / "fixtures" / "nemo2" / "contexts"


def test_a_whole_context_becomes_our_objects():
    context = load_context(CONTEXTS / "full")

    assert isinstance(context, TrainerContext)
    assert isinstance(context.trainer, nemologger.trainer.Trainer)
    assert context.trainer.max_steps == 10
    assert isinstance(context.model, ctxmod.Model)
    assert context.model.config == ctxmod.Cfg(dim=16)
    assert isinstance(context.model.optim, functools.partial)
    assert context.model.optim.func is torch.optim.Adam
    assert context.model.optim.keywords == {"lr": 0.001}
    assert context.extra["datamodule"].seq_length == 64
    assert context.extra["fn"](2) == 6


def test_dtypes_functions_classes_and_dataclasses_come_back():
    model = load_context(CONTEXTS / "dataclass_dtype", "model")
    assert model.config.dtype is torch.bfloat16
    assert model.config.sub == ctxmod.SubCfg(heads=2, act=torch.nn.functional.relu, tags=["z"])
    assert model.loss_fn is torch.nn.functional.l1_loss
    assert model.optim is torch.optim.SGD
    assert model.parts == [1, "a", (2, 3), {"k": None}]


def test_subpaths_are_those_of_nemo():
    assert load_context(CONTEXTS / "full", "model.config") == ctxmod.Cfg(dim=16)
    assert load_context(CONTEXTS / "full", "extra.datamodule").seq_length == 64
    assert load_context(CONTEXTS / "full", "extra['datamodule'].seq_length") == 64
    assert isinstance(load_context(CONTEXTS / "full", "trainer"), pl.Trainer)


def test_an_artifact_becomes_an_absolute_path_inside_the_context():
    tokenizer = load_context(CONTEXTS / "file_artifact", "model.tokenizer")
    assert Path(tokenizer.vocab_file) == (CONTEXTS / "file_artifact" / "vocab.txt").resolve()


def test_an_artifact_that_nemo_could_not_find_comes_back_as_it_was_written():
    assert load_context(CONTEXTS / "file_artifact_missing").model.tokenizer.vocab_file == "gpt2-not-a-file"
    config = load_context(CONTEXTS / "file_artifact_missing", "model", build=False)
    assert config.tokenizer.vocab_file == "gpt2-not-a-file"


def test_a_pickled_object_is_refused_by_name_and_can_be_left_out():
    with pytest.raises(
        RefusedError, match=r"model.parts\[0\] is a ctxmod.Part that was pickled into the file '7fa4ecbd"
    ):
        load_context(CONTEXTS / "pickle_in_list")
    with pytest.warns(UserWarning, match="pickled"):
        config = load_context(CONTEXTS / "pickle_in_list", build=False)
    assert config.trainer.max_steps == 10
    with pytest.raises(RefusedError, match="pickled"):
        fdl.build(config.model)


def test_a_pickled_object_is_read_with_trust_and_only_from_the_context(tmp_path):
    text = (CONTEXTS / "pickle_in_list" / "io.json").read_text()
    name = "7fa4ecbd-cb5a-4d7b-bd07-ff8bca76aa45"
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / name).write_bytes(pickle.dumps(ctxmod.Part(3)))
    (tmp_path / "context" / "io.json").write_text(text)
    assert load_context(tmp_path, "model.parts", trust=True)[0].fn == 3

    (tmp_path / "outside").write_bytes(pickle.dumps(ctxmod.Part(3)))
    (tmp_path / "context" / "io.json").write_text(text.replace(name, "../outside"))
    with pytest.raises(RefusedError):
        load_context(tmp_path, trust=True)


def test_a_class_we_lack_is_named_and_leaves_a_placeholder_when_not_built():
    with pytest.raises(
        ContextError,
        match=r"model is __main__.M, which does not exist here: module __main__ has no 'M'.*define it here too",
    ):
        load_context(CONTEXTS / "main_module")
    with pytest.warns(UserWarning, match="__main__.M"):
        config = load_context(CONTEXTS / "main_module", build=False)
    assert config.trainer.max_steps == 12
    with pytest.raises(ContextError, match=r"__main__\.M"):
        fdl.build(config.model)


def test_a_class_of_nemo_without_a_counterpart_is_named(tmp_path):
    text = (CONTEXTS / "full" / "io.json").read_text().replace('"module": "ctxmod"', '"module": "nemo.collections.llm"')
    (tmp_path / "io.json").write_text(text)
    with pytest.raises(ContextError, match=r"nemo.collections.llm.* a class of NeMo that has no counterpart here"):
        load_context(tmp_path)
    with pytest.warns(UserWarning, match="no counterpart"):
        config = load_context(tmp_path, build=False)
    assert config.model.config.dim == 16


def ours(config):
    return yaml.safe_load(to_yaml(config))


def theirs(name, file="model.yaml"):
    document = yaml.safe_load((CONTEXTS / name / file).read_text())
    text = yaml.safe_dump(document).replace("nemo.lightning.pytorch.trainer.Trainer", "nemologger.trainer.Trainer")
    # NeMo shows a default dtype by its type when it has not seen one explicitly; ours always shows which.
    text = text.replace("_call_: true\n    _target_: torch.dtype", "_call_: false\n    _target_: torch.float32")
    return yaml.safe_load(text)


@pytest.mark.parametrize("name", ["full", "dataclass_dtype", "file_artifact"])
def test_model_yaml_is_what_nemo_writes_for_the_same_objects(name):
    config = load_context(CONTEXTS / name, "model", build=False)
    if name == "file_artifact":
        config.tokenizer.vocab_file = "vocab.txt"
    assert ours(config) == theirs(name)


def test_trainer_yaml_is_what_nemo_writes_but_for_arguments_that_lightning_has_added():
    ours_ = ours(load_context(CONTEXTS / "dataclass_dtype", "trainer", build=False))
    theirs_ = theirs("dataclass_dtype", "trainer.yaml")
    assert {key: ours_[key] for key in theirs_} == theirs_


def test_a_missing_artifact_looks_as_in_nemo(tmp_path):
    class Tok(ctxmod.Tok):
        __io_artifacts__ = (FileArtifact("vocab_file", required=False),)

    ctxmod.LocalTok, Tok.__qualname__, Tok.__module__ = Tok, "LocalTok", "ctxmod"
    try:
        with pytest.warns(UserWarning, match="no file 'gpt2-not-a-file'"):
            ctxmod.Anything(tok=Tok("gpt2-not-a-file")).io_dump(tmp_path, yaml_attrs=["tok"])
    finally:
        del ctxmod.LocalTok
    found = yaml.safe_load((tmp_path / "tok.yaml").read_text())["vocab_file"]
    expected = theirs("file_artifact_missing")["tokenizer"]["vocab_file"]
    assert found == {**expected, "_target_": "nemologger.io.FileArtifact"}
