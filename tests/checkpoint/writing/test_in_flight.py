"""What one rank knows of a save that is under way."""

from __future__ import annotations

from nemologger.checkpoint.manifest import FileRecord, Manifest
from nemologger.checkpoint.writing.equipment import Equipment
from nemologger.checkpoint.writing.in_flight import InFlight
from nemologger.checkpoint.writing.plan import Planner
from nemologger.checkpoint.writing.reports import dumps, report_of
from nemologger.checkpoint.writing.writer_main import Job, Outcome
from nemologger.ranks import SingleProcess


def test_a_report_is_read_once_however_often_rank_zero_looks(tmp_path):
    checkpoint = tmp_path / "step=1"
    records = [{f"weights/__{rank}_0.distcp": FileRecord(rank, ("00",))} for rank in range(3)]
    job = Job(str(checkpoint), (), {})
    equipment = Equipment(Planner(SingleProcess(), files_per_rank=2), SingleProcess(), "auto")
    save = InFlight(checkpoint, Manifest(1, 0), job, equipment, outcome=Outcome(records[0]))

    def report(rank: int) -> None:
        file = report_of(checkpoint, rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(dumps(records[rank]))

    assert save.all_records(3) is None
    report(1)
    assert save.all_records(3) is None
    report_of(checkpoint, 1).unlink()
    report(2)
    assert save.all_records(3) == {**records[0], **records[1], **records[2]}
