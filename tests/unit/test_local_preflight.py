"""Preflight names what is missing, and only that."""

from dataclasses import replace

from nitsum_local.binaries import go_version
from nitsum_local.preflight import Facts, missing

GOOD = Facts((3, 11), (1, 26), True, False, 25.0, 16.0, True, True)


def test_a_good_machine_lacks_nothing() -> None:
    assert missing(GOOD) == []


def test_go_matters_only_where_something_is_built() -> None:
    assert "Go 1.26" in str(missing(replace(GOOD, go=(1, 25)))[0])
    assert missing(replace(GOOD, go=None, build_needed=False)) == []


def test_disk_matters_only_before_the_environment_is_there() -> None:
    assert "20 GB" in str(missing(replace(GOOD, disk_free_gb=3.0))[0])
    assert missing(replace(GOOD, disk_free_gb=3.0, environment_there=True)) == []


def test_everything_missing_is_named_at_once_with_a_remedy() -> None:
    found = missing(Facts((3, 9), None, True, False, 1.0, 2.0, False, False))
    assert len(found) == 6
    assert all(m.remedy and "\n" not in str(m) for m in found)


def test_go_version_is_read_from_its_output() -> None:
    assert go_version("go version go1.26.8 linux/amd64") == (1, 26)
    assert go_version("") is None
