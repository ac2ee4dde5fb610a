"""No request reaches a private field, whatever it is made of."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_gateway import allowed

PRIVATE = [
    "rid", "custom_params", "priority", "input_ids", "bootstrap_host", "bootstrap_room", "session_params", "session_id", "lora_path",
    "custom_logit_processor", "extra_key", "return_hidden_states", "data_parallel_rank", "routed_dp_rank", "images_config", "watermark",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
NAMES = st.sampled_from(PRIVATE + sorted(set().union(*allowed.FIELDS.values()))) | st.text(max_size=20)


@pytest.mark.parametrize("path", sorted(allowed.FIELDS))
def test_no_private_field_is_on_the_list(path: str) -> None:
    assert not set(PRIVATE) & allowed.FIELDS[path]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(allowed.FIELDS)), st.dictionaries(NAMES, JSON, max_size=8))
def test_what_passes_holds_allowed_fields_only(path: str, body: dict[str, Any]) -> None:
    wrong = allowed.problem(path, body)
    if wrong is None:
        assert set(body) <= allowed.FIELDS[path]
        assert isinstance(body["model"], str)
    else:
        assert wrong[1]


def test_an_unknown_field_is_named() -> None:
    assert (allowed.problem("/v1/completions", {"model": "m", "prompt": "x", "max_token": 3}) or ("",))[0] == "max_token"


def test_media_are_refused_by_position() -> None:
    image = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
    body = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, image]}]}
    assert (allowed.problem("/v1/chat/completions", body) or ("",))[0] == "messages[0].content[1]"


def test_a_deep_body_is_refused() -> None:
    deep: Any = "x"
    for _ in range(allowed.DEPTH_MAX + 5):
        deep = [deep]
    assert allowed.problem("/v1/completions", {"model": "m", "prompt": deep}) is not None
