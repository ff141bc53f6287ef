from pathlib import Path

import pytest

from loadtests.records import Answer, Record
from loadtests.reload import Change, split
from loadtests.variant import write_variant
from models.loading import Bundle


def record(scheduled: float, seconds: float, status: int = 200) -> Record:
    return Record(scheduled, scheduled, scheduled + seconds, Answer(status))


def test_a_request_belongs_to_a_change_if_any_of_its_time_does() -> None:
    records = [record(0, 0.1), record(4.9, 0.3), record(6, 0.4), record(9.9, 0.2, 503), record(12, 0.2)]
    found = split(records, [Change(5, 10)], 20)
    assert (found.outside.requests, found.during.requests) == (2, 3)
    assert found.during.refused == {"503": 1} and found.outside.refused == {}
    assert found.ratio == pytest.approx(2) and found.changes == [5]


def test_nothing_during_a_change_gives_no_ratio() -> None:
    assert split([record(0, 0.1)], [Change(5, 10)], 20).ratio is None


@pytest.mark.parametrize("other_weights", [False, True])
def test_a_variant_is_a_whole_bundle_of_its_own(bundle: Bundle, tmp_path: Path, other_weights: bool) -> None:
    write_variant(bundle.folder, tmp_path / "other", other_weights=other_weights)
    other = Bundle.open(tmp_path / "other")
    assert other.id != bundle.id
    assert (other.manifest.backbone.merged_id != bundle.manifest.backbone.merged_id) == other_weights
    other.backbone()  # its weights are those it says
