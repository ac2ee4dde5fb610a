import json

import pytest

from nitsum.errors import InvalidSpec
from nitsum.layout import FlipMode
from nitsum.perf.profile import find, load_shipped, parse, shipped


@pytest.mark.parametrize("name", shipped())
def test_shipped_profiles_say_where_they_come_from_and_behave(name: str) -> None:
    p = load_shipped(name)
    assert p.origin in ("modelled", "measured")
    assert p.note
    for tp in p.tp_sizes:
        assert p.decode_ms(tp, 1, 128) < p.decode_ms(tp, 32, 128) < p.decode_ms(tp, 64, 128)
        assert p.prefill_ms(tp, 100) < p.prefill_ms(tp, 20_000)
        assert p.mixed_ms(tp, 100, 4, 128) > max(p.prefill_ms(tp, 100), p.decode_ms(tp, 4, 128))
    assert p.pause_ms(5000, FlipMode.MIGRATE_FIRST, 1, p.tp_sizes[-1]) <= p.pause_ms(5000, FlipMode.ABORT, 1, p.tp_sizes[-1])
    assert find(p.model, p.gpu) == p


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(InvalidSpec, match=r"spec\.profile: no profile 'x'; there are: .*tiny-llama\.slot"):
        load_shipped("x")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"origin": "guessed"}, "origin"),
        ({"tp": {}}, "tp"),
        ({"tp": {"1": {}}}, r"tp\.1"),
        ({"tp": {"1": {"decode": {"batch": [2, 1], "context": [1], "ms": [[1], [1]]}}}}, r"tp\.1\.decode\.batch"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidSpec, match=rf"profile p: {field}"):
        parse(json.dumps({"origin": "modelled", **change}), "p")
