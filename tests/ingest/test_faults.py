"""The broken dataset: each of its faults is caught, where it is, with what is wrong."""

from pathlib import Path

from tests.ingest.faults import END, PAGE, START, Fault, _cell, told


def test_every_fault_is_told_with_its_line_and_reason(tmp_path: Path) -> None:
    faults, reasons = told(tmp_path)
    assert len({fault.what for fault in faults}) == len(faults) >= 40
    assert [fault for fault in faults if fault.said not in reasons.get((fault.file, fault.line), "")] == []
    # Only the other half of the conflict is in quarantine beside them.
    assert [place for place in reasons if place not in {(f.file, f.line) for f in faults}] == [("train.jsonl", 4)]
    _the_page_says_the_same(faults, reasons)


def _the_page_says_the_same(faults: list[Fault], reasons: dict[tuple[str, int], str]) -> None:
    table = PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
    for number, fault in enumerate(faults, start=1):
        said = _cell(reasons[fault.file, fault.line])
        line = f"| {number} | {fault.what} | `{fault.file}:{fault.line}` | {said} |"
        assert line in table, "run python -m tests.ingest.faults --write"
