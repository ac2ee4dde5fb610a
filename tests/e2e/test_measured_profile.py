"""`nitsum profile --from-engine` on the stock server that the other tests take their expectations from."""

from nitsum.perf.profile import parse

from .conftest import Expected


def test_a_live_engine_is_measured(expected: Expected) -> None:
    p = parse(expected.profile, "stock")
    assert (p.model, p.gpu, p.origin, p.tp_sizes) == ("tiny-llama", "slot", "measured", (1,))
    assert p.source["tool"] == "sglang"
    assert "computed" in p.note
    assert p.kv_capacity_tokens(1, (1,)) == 8192
    table = p.tables[1]
    assert len(table.batch) >= 2
    assert len(table.prefill_tokens) >= 3
    assert len(table.prefill_cached) == 2
    # A CPU shows it clearly: more tokens take longer, a cached prefix costs less than computing it.
    assert p.prefill_ms(1, 1024) > 2 * p.prefill_ms(1, 16)
    assert p.prefill_ms(1, 64, 512) < p.prefill_ms(1, 64 + 512)
    assert p.mixed_ms(1, 64, 4, 64) == p.prefill_ms(1, 64) + p.decode_ms(1, 4, 64)
