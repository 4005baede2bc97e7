"""Files that are kept with a context."""

from __future__ import annotations

import json
import pathlib
import shutil

import ctxmod
import pytest
from ctxmod import Anything, DirTok, Model, Tok

from nemologger.context.artifacts import artifacts_of
from nemologger.errors import ContextError, RefusedError
from nemologger.io import FileArtifact, load_context, track_io


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("a b c")
    return path


def test_a_file_is_copied_and_found_wherever_the_context_is_moved(vocabulary, tmp_path):
    Model(ctxmod.Cfg(), tokenizer=Tok(str(vocabulary))).io_dump(tmp_path / "context")
    vocabulary.unlink()
    shutil.move(tmp_path / "context", tmp_path / "elsewhere")

    tokenizer = load_context(tmp_path / "elsewhere").tokenizer
    assert tokenizer.vocab_file == str((tmp_path / "elsewhere" / "vocab.txt").resolve())
    assert pathlib.Path(tokenizer.vocab_file).read_text() == "a b c"


def test_the_object_itself_is_not_changed_by_a_dump(vocabulary, tmp_path):
    tokenizer = Tok(str(vocabulary))
    tokenizer.io_dump(tmp_path / "context")
    assert tokenizer.__io__.vocab_file == tokenizer.vocab_file == str(vocabulary)


def test_io_json_has_the_name_alone_as_nemo_has_it(vocabulary, tmp_path):
    Tok(str(vocabulary)).io_dump(tmp_path / "context")
    text = (tmp_path / "context" / "io.json").read_text()
    assert '"value": "vocab.txt"' in text
    assert str(tmp_path) not in text


def test_a_path_comes_back_as_a_path(vocabulary, tmp_path):
    Tok(vocabulary).io_dump(tmp_path / "context")
    assert load_context(tmp_path / "context").vocab_file == (tmp_path / "context" / "vocab.txt").resolve()


def test_two_files_of_one_name_both_survive(tmp_path):
    paths = [tmp_path / folder / "vocab.txt" for folder in ("one", "two", "three")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(path.parent.name)
    tokenizers = [Tok(str(path)) for path in paths]
    Anything(tokenizers, Tok(str(paths[1]))).io_dump(tmp_path / "context")

    again = load_context(tmp_path / "context")
    found = [pathlib.Path(tokenizer.vocab_file) for tokenizer in (*again.args[0], again.args[1])]
    assert [path.read_text() for path in found] == ["one", "two", "three", "two"]
    assert [path.name for path in found] == ["vocab.txt", "vocab-2.txt", "vocab-3.txt", "vocab-2.txt"]


@pytest.mark.parametrize("name", ["io.json", "IO.JSON", "tok.yaml"])
def test_a_file_does_not_take_the_name_of_one_of_ours(name, tmp_path):
    (tmp_path / name).write_text("mine")
    Anything(tok=Tok(str(tmp_path / name))).io_dump(tmp_path / "context", yaml_attrs=["tok"])
    tokenizer = load_context(tmp_path / "context", "tok")
    assert pathlib.Path(tokenizer.vocab_file).read_text() == "mine"


def test_a_missing_file_is_an_error_that_names_it_and_nothing_is_written(tmp_path):
    model = Model(ctxmod.Cfg(), tokenizer=Tok(str(tmp_path / "gone.txt")))
    with pytest.raises(ContextError, match=r"tokenizer.vocab_file: there is no file '.*gone.txt', which FileArtifact"):
        model.io_dump(tmp_path / "context")
    assert not (tmp_path / "context").exists()


def test_a_missing_file_can_be_left_out_for_the_sake_of_the_rest(tmp_path):
    gone = str(tmp_path / "gone.txt")
    model = Model(ctxmod.Cfg(), tokenizer=Tok(gone))
    with pytest.warns(UserWarning, match=r"tokenizer.vocab_file: there is no file"):
        model.io_dump(tmp_path / "context", strict=False)
    assert load_context(tmp_path / "context").tokenizer.vocab_file == gone


def test_a_missing_file_that_is_not_required_keeps_its_argument(vocabulary, tmp_path):
    with pytest.warns(UserWarning, match=r"merges: there is no file 'nowhere.txt'"):
        Tok(str(vocabulary), merges="nowhere.txt").io_dump(tmp_path / "context")
    document = json.loads((tmp_path / "context" / "io.json").read_text())
    nodes = [node for name, node in document["objects"].items() if name.startswith("file_artifact")]
    assert len(nodes) == 1
    assert [item[1]["value"] for item in nodes[0]["items"]] == ["nowhere.txt", True]
    assert load_context(tmp_path / "context").merges == "nowhere.txt"


def test_a_directory_is_copied_with_all_it_holds(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "deep" / "b.bin").write_bytes(b"\x00" * 100)
    (folder / "link.txt").symlink_to(folder / "a.txt")
    DirTok(str(folder)).io_dump(tmp_path / "context")
    (folder / "a.txt").unlink()
    DirTok(str(folder)).io_dump(tmp_path / "context")

    found = pathlib.Path(load_context(tmp_path / "context").folder)
    assert sorted(str(p.relative_to(found)) for p in found.rglob("*")) == ["deep", "deep/b.bin"]


def test_a_directory_without_end_is_an_error(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "again").symlink_to(folder)
    with pytest.raises(ContextError, match="no end"):
        DirTok(str(folder)).io_dump(tmp_path / "context")
    assert not (tmp_path / "context" / "io.json").exists()


def test_an_object_that_was_loaded_can_be_dumped_where_it_came_from(vocabulary, tmp_path):
    Tok(str(vocabulary)).io_dump(tmp_path / "context")
    load_context(tmp_path / "context").io_dump(tmp_path / "context")
    assert pathlib.Path(load_context(tmp_path / "context").vocab_file).read_text() == "a b c"


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/passwd", "sub/../../secret.txt", ".", "link.txt"])
def test_a_name_that_leads_out_of_the_context_is_refused(name, vocabulary, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    for value in (str(vocabulary), vocabulary):
        context = tmp_path / "context"
        Tok(value).io_dump(context)
        (context / "link.txt").unlink(missing_ok=True)
        (context / "link.txt").symlink_to(tmp_path / "secret.txt")
        text = (context / "io.json").read_text().replace('"value": "vocab.txt"', f'"value": "{name}"')
        (context / "io.json").write_text(text)
        for build in (True, False):
            with pytest.raises(RefusedError, match=r"vocab_file names the file .* but it lies outside of it"):
                load_context(context, build=build)


def test_artifacts_of_a_tracked_class(vocabulary, tmp_path):
    ctxmod.Theirs = type("Theirs", (ctxmod.Base,), {"__module__": "ctxmod", "__qualname__": "Theirs"})
    try:
        track_io(ctxmod.Theirs, artifacts=[FileArtifact("x")])
        assert artifacts_of(ctxmod.Theirs) == [FileArtifact("x")]
        Anything(ctxmod.Theirs(str(vocabulary))).io_dump(tmp_path / "context")
        assert pathlib.Path(load_context(tmp_path / "context").args[0].x).parent == (tmp_path / "context").resolve()
    finally:
        del ctxmod.Theirs


def test_an_argument_without_a_file_is_left_alone(tmp_path):
    Tok(None).io_dump(tmp_path / "context")
    assert load_context(tmp_path / "context").vocab_file is None
