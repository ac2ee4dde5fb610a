"""What a gateway remembers over a restart: the routes in force, and the highest term it ever heard."""

from pathlib import Path

from nitsum_api.gateway.v1 import gateway_pb2
from nitsum_gateway.service import State


def routes(term: int, generation: int) -> gateway_pb2.ApplyRoutesRequest:
    return gateway_pb2.ApplyRoutesRequest(contract_version="1", term=term, generation=generation, pools=[gateway_pb2.PoolRoute()])


def test_routes_and_term_outlive_a_restart(tmp_path: Path) -> None:
    State(tmp_path).obey(routes(3, 7))
    again = State(tmp_path)
    assert (again.highest_term, again.generation, len(again.routes.pools)) == (3, 7, 1)


def test_a_term_that_was_only_heard_counts_and_the_routes_stay(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.obey(routes(3, 7))
    state.hear(5)
    state.hear(4)
    again = State(tmp_path)
    assert (again.highest_term, again.generation, len(again.routes.pools)) == (5, 7, 1)


def test_a_torn_file_is_no_reason_not_to_start(tmp_path: Path) -> None:
    State(tmp_path).obey(routes(3, 7))
    (tmp_path / "routes.json").write_text('{"term": 3, "rou')
    assert State(tmp_path).highest_term == 0
