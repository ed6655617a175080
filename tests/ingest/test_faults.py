"""The broken dataset: each of its faults is quarantined with its file, line and reason."""

from pathlib import Path

from tests.ingest.faults import END, PAGE, START, Fault, _cell, quarantine_reasons


def test_every_fault_is_reported_with_its_line_and_reason(tmp_path: Path) -> None:
    faults, reasons = quarantine_reasons(tmp_path)
    assert len({fault.name for fault in faults}) == len(faults) >= 40
    assert [fault for fault in faults if fault.reason not in reasons.get((fault.file, fault.line), "")] == []
    # Only the other half of the conflict is in quarantine beside them.
    locations = {(fault.file, fault.line) for fault in faults}
    assert [location for location in reasons if location not in locations] == [("train.jsonl", 4)]
    _assert_page_is_current(faults, reasons)


def _assert_page_is_current(faults: list[Fault], reasons: dict[tuple[str, int], str]) -> None:
    table = PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
    for number, fault in enumerate(faults, start=1):
        reason = _cell(reasons[fault.file, fault.line])
        line = f"| {number} | {fault.name} | `{fault.file}:{fault.line}` | {reason} |"
        assert line in table, "run python -m tests.ingest.faults --write"
