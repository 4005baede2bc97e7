"""What rank 0 does between the steps of training while thousands of others write."""

from __future__ import annotations

import json
from dataclasses import asdict

from nemologger.checkpoint.manifest import FileRecord, Manifest
from nemologger.checkpoint.writing.async_saver import AsyncSaver, _report
from nemologger.checkpoint.writing.in_flight import InFlight
from nemologger.checkpoint.writing.writer_main import Job, Outcome
from nemologger.disk import LocalDisk
from nemologger.ranks import SingleProcess


def test_a_report_is_read_once_however_often_rank_zero_looks(tmp_path):
    checkpoint = tmp_path / "step=1"
    records = [{f"weights/__{rank}_0.distcp": FileRecord(rank, ("00",))} for rank in range(3)]
    save = InFlight(checkpoint, Manifest(1, 0), Job(str(checkpoint), (), {}), outcome=Outcome(records[0]))
    saver = AsyncSaver(LocalDisk(), SingleProcess(0, 3))

    def report(rank: int) -> None:
        file = _report(checkpoint, rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({name: asdict(record) for name, record in records[rank].items()}))

    assert saver._all_records(save) is None
    report(1)
    assert saver._all_records(save) is None
    _report(checkpoint, 1).unlink()
    report(2)
    assert saver._all_records(save) == {**records[0], **records[1], **records[2]}
