import pytest

from nitsum.errors import InvalidSpec
from nitsum.quantity import duration_ms, format_ms, share


@pytest.mark.parametrize(("text", "ms"), [("300ms", 300), ("1.5s", 1500), ("2m", 120_000), ("1h", 3_600_000), ("50us", 0.05)])
def test_durations(text: str, ms: float) -> None:
    assert duration_ms(text, "spec.tiers[0].ttft") == ms


@pytest.mark.parametrize("text", ["300", "ms", "-1s", "1 s", ""])
def test_an_illegal_duration_names_field_and_remedy(text: str) -> None:
    with pytest.raises(InvalidSpec, match=r"spec\.tiers\[0\]\.ttft: .*write a number and a unit"):
        duration_ms(text, "spec.tiers[0].ttft")


@pytest.mark.parametrize("text", ["0%", "101%", "99", "half"])
def test_an_illegal_share(text: str) -> None:
    with pytest.raises(InvalidSpec):
        share(text, "spec.tiers[0].target")


def test_share_and_format() -> None:
    assert share("99.5%", "x") == 0.995
    assert [format_ms(v) for v in (20.0, 1500.0, 1000.0)] == ["20ms", "1.5s", "1s"]
