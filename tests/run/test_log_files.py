from __future__ import annotations

import io
import logging
import pickle
import sys
import warnings
from pathlib import Path

import pytest

from nemologger.errors import ConfigurationError
from nemologger.run.log_files import LogFiles

MINE = "nemo_log_globalrank-0_localrank-0.txt"


@pytest.fixture
def bare():
    """The root logger, to be as a script has it: pytest adds its handlers after this, and removes them by itself."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    root.setLevel(logging.WARNING)
    yield root
    root.setLevel(level)
    for handler in [h for h in root.handlers if type(h) is logging.StreamHandler]:
        root.removeHandler(handler)
    for handler in handlers:
        if type(handler).__name__ != "LogCaptureHandler":  # pytest has one for every phase, and the others for good
            root.addHandler(handler)


def strip_pytest(root: logging.Logger) -> None:
    root.handlers[:] = [h for h in root.handlers if not type(h).__module__.startswith("_pytest")]


@pytest.fixture
def attached(tmp_path, bare):
    made: list[LogFiles] = []

    def attach(directory: Path = tmp_path, rank: int = 0, **settings) -> LogFiles:
        strip_pytest(bare)
        files = LogFiles(directory, **settings)
        files.attach(rank, rank)
        made.append(files)
        return files

    yield attach
    for files in made:
        files.release()


def test_info_of_any_logger_is_filed_and_warnings_are_filed_twice(tmp_path, bare, attached):
    files = attached()
    logging.getLogger("mine").info("an info")
    logging.getLogger("mine").debug("a detail")
    logging.getLogger("mine").warning("a warning, ünïcode")
    files.release()
    own, errors = (tmp_path / MINE).read_text("utf-8"), (tmp_path / "nemo_error_log.txt").read_text("utf-8")
    assert "INFO [rank 0] mine: an info" in own
    assert "a detail" not in own
    assert "a warning, ünïcode" in own
    assert "a warning, ünïcode" in errors
    assert "an info" not in errors


def test_lightning_has_a_file_of_its_own_whether_it_passes_its_messages_on_or_not(tmp_path, bare, attached):
    lightning = logging.getLogger("lightning.pytorch")
    before = lightning.propagate
    for passes_on in (False, True):
        directory = tmp_path / str(passes_on)
        lightning.propagate = passes_on
        try:
            files = attached(directory)
            logging.getLogger("lightning.pytorch.utilities").info("a tip")
            logging.getLogger("lightning.pytorch").warning("a fault")
            files.release()
        finally:
            lightning.propagate = before
        assert (directory / "lightning_logs.txt").read_text("utf-8").count("a tip") == 1
        assert (directory / "nemo_error_log.txt").read_text("utf-8").count("a fault") == 1
        assert "a tip" not in (directory / MINE).read_text("utf-8")


def test_release_leaves_logging_and_warnings_as_they_were(tmp_path, bare, attached):
    def state():
        loggers = [bare, *map(logging.getLogger, ("lightning", "lightning.pytorch", "lightning.fabric"))]
        found = [(lo.level, lo.handlers[:], [h.filters[:] for h in lo.handlers]) for lo in loggers]
        return found, warnings.showwarning

    strip_pytest(bare)
    bare.addHandler(logging.StreamHandler(io.StringIO()))
    before = state()
    open_before = open_files(tmp_path)
    files = attached()
    assert state() != before
    assert len(open_files(tmp_path)) == 3
    files.release()
    files.release()
    assert state() == before
    assert open_files(tmp_path) == open_before


def open_files(directory: Path) -> list[str]:
    links = Path("/proc/self/fd")
    if not links.is_dir():
        pytest.skip("needs /proc")
    targets = [link.resolve() for link in links.iterdir()]
    return [str(target) for target in targets if target.is_relative_to(directory)]


def test_the_console_shows_what_it_did_before_and_no_more(tmp_path, bare, attached, monkeypatch):
    console, last_resort = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", last_resort)
    attached()
    logging.getLogger("mine").info("quiet")
    logging.getLogger("mine").warning("loud")
    assert last_resort.getvalue() == "loud\n"

    attached(tmp_path / "b").release()
    bare.addHandler(logging.StreamHandler(console))
    logging.getLogger("chatty").setLevel(logging.INFO)
    try:
        attached(tmp_path / "c")
        logging.getLogger("mine").info("quiet")
        logging.getLogger("mine").warning("loud")
        logging.getLogger("chatty").info("chatter")
    finally:
        logging.getLogger("chatty").setLevel(logging.NOTSET)
    assert console.getvalue() == "loud\nchatter\n"
    assert last_resort.getvalue() == "loud\n"


def test_python_warnings_are_shown_as_before_and_filed_once(tmp_path, attached):
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: shown.append(str(message))
        files = attached()
        warnings.warn("odd batch", UserWarning, stacklevel=1)
        files.release()
        warnings.warn("after the run", UserWarning, stacklevel=1)
    errors = (tmp_path / "nemo_error_log.txt").read_text("utf-8")
    assert errors.count("UserWarning: odd batch") == 1
    assert "after the run" not in errors
    assert shown == ["odd batch", "after the run"]


def test_python_warnings_that_logging_already_captures_are_not_filed_twice(tmp_path, bare, attached):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = warnings._showwarning_orig
        logging.captureWarnings(True)
        try:
            files = attached()
            warnings.warn("odd batch", UserWarning, stacklevel=1)
            files.release()
        finally:
            logging.captureWarnings(False)
    assert (tmp_path / "nemo_error_log.txt").read_text("utf-8").count(
        "odd batch"
    ) == 2  # the message, and its code line


def test_a_wrapper_around_ours_survives_and_files_nothing_after_the_release(tmp_path, bare, attached):
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: seen.append(str(message))
        files = attached()
        ours = warnings.showwarning

        def wrapper(*arguments, **named):
            ours(*arguments, **named)

        warnings.showwarning = wrapper
        files.release()
        assert warnings.showwarning is wrapper
        warnings.warn("late", UserWarning, stacklevel=1)
    assert seen == ["late"]
    assert "late" not in (tmp_path / "nemo_error_log.txt").read_text("utf-8")


@pytest.mark.parametrize(
    ("settings", "who", "writes"),
    [
        ({}, (5, 1), True),
        ({"local_rank_0_only": True}, (4, 0), True),
        ({"local_rank_0_only": True}, (5, 1), False),
        ({"global_rank_0_only": True}, (4, 0), False),
        ({"global_rank_0_only": True}, (0, 0), True),
    ],
)
def test_the_switches_say_which_rank_has_a_file(tmp_path, bare, settings, who, writes):
    files = LogFiles(tmp_path, **settings)
    files.attach(*who)
    logging.getLogger("mine").info("hello")
    files.release()
    assert (tmp_path / f"nemo_log_globalrank-{who[0]}_localrank-{who[1]}.txt").exists() == writes


def test_errors_of_every_rank_are_in_the_error_log_with_its_number(tmp_path, bare, attached):
    files = attached(rank=3, global_rank_0_only=True)
    logging.getLogger("mine").warning("only mine")
    assert not (tmp_path / "nemo_error_log.txt").exists()
    logging.getLogger("mine").error("needed")
    files.release()
    assert "ERROR [rank 3] mine: needed" in (tmp_path / "nemo_error_log.txt").read_text("utf-8")
    assert "only mine" not in (tmp_path / "nemo_error_log.txt").read_text("utf-8")


def test_another_run_takes_over_and_the_first_can_come_back(tmp_path, bare, attached):
    first, second = attached(tmp_path / "a"), attached(tmp_path / "b")
    logging.getLogger("mine").info("for b")
    first.attach(0, 0)
    logging.getLogger("mine").info("for a")
    second.release()
    logging.getLogger("mine").info("for a, too")
    first.release()
    a, b = ((tmp_path / name / MINE).read_text("utf-8") for name in "ab")
    assert "for b" not in a
    assert "for a\n" in a
    assert "for a, too" in a
    assert "for a" not in b


def test_a_note_with_its_traceback_goes_to_the_files_alone(tmp_path, bare, attached, capsys):
    files = attached()
    try:
        raise RuntimeError("boom")
    except RuntimeError as error:
        files.note(logging.ERROR, "stopped", error)
    files.release()
    errors = (tmp_path / "nemo_error_log.txt").read_text("utf-8")
    assert "stopped" in errors
    assert 'raise RuntimeError("boom")' in errors
    assert "boom" not in capsys.readouterr().err


def test_they_travel_to_another_process_detached(tmp_path, bare, attached):
    files = pickle.loads(pickle.dumps(attached()))
    files.release()
    logging.getLogger("mine").info("still filed here")
    assert "still filed here" in (tmp_path / MINE).read_text("utf-8")


def test_a_directory_that_cannot_be_written_is_named(tmp_path, bare):
    strip_pytest(bare)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="rank 2 cannot write its log files"):
        LogFiles(tmp_path / "file").attach(2, 0)
    (tmp_path / "d" / "lightning_logs.txt").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=r"lightning_logs\.txt"):
        LogFiles(tmp_path / "d").attach(0, 0)
    assert bare.handlers == []
    assert open_files(tmp_path) == []


def test_a_disk_that_is_full_at_the_end_does_not_replace_how_the_run_ends(tmp_path, bare, attached):
    for name in (MINE, "nemo_error_log.txt"):
        (tmp_path / name).symlink_to("/dev/full")
    files = attached()
    logging.getLogger("mine").error("nowhere to go")
    files.release()
    assert not bare.handlers
    assert open_files(tmp_path) == []


def test_a_full_disk_is_said_once_for_each_file_and_lines_are_shown_as_before(tmp_path, bare, attached, capsys):
    (tmp_path / MINE).symlink_to("/dev/full")
    attached()
    for number in range(3):
        logging.getLogger("mine").warning("warning %d", number)
    shown = capsys.readouterr().err.splitlines()
    said = "cannot be written: [Errno 28] No space left on device. What is logged meanwhile may be lost there."
    assert shown == [
        f"{tmp_path / MINE} {said}",
        *[f"warning {number}" for number in range(3)],
    ]
    logging.getLogger("mine").warning("%d", "no number")  # the program's own mistake
    assert "--- Logging error ---" in capsys.readouterr().err


def test_a_program_without_logging_errors_is_told_of_no_full_disk(tmp_path, bare, attached, capsys, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    (tmp_path / MINE).symlink_to("/dev/full")
    attached()
    logging.getLogger("mine").warning("shown")
    assert capsys.readouterr().err == "shown\n"


def test_an_error_of_another_rank_is_shown_where_its_file_cannot_be_made(tmp_path, bare, attached, capsys):
    """That rank opens the file of errors at its first one."""
    attached(rank=1)
    (tmp_path / "nemo_error_log.txt").mkdir()
    logging.getLogger("mine").error("a save failed")
    said, shown = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{tmp_path}/nemo_error_log.txt cannot be written: [Errno 21] Is a directory")
    assert shown == "a save failed"
