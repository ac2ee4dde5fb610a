"""What a host reads in a checkpoint before anything runs on it."""

from pathlib import Path

from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_host.engines import Engines, Settings
from nitsum_host.journal import Journal
from nitsum_host.node import Node
from nitsum_host.service import Host
from nitsum_sglang.port import Engine, EngineSpec
from nitsum_sglang.testing.models import tiny_llama


def host(folder: Path) -> Host:
    def make(spec: EngineSpec) -> Engine:
        raise AssertionError("nothing is started to read a checkpoint")

    node = Node(1)
    engines = Engines(node, Settings(folder, folder / "memory", make=make), lambda engine_id: None)
    gpus = [agent_pb2.Gpu(uuid=f"g{i}") for i in range(8)]
    return Host(node, engines, Journal(folder), folder, gpus, "")


def facts(folder: Path, path: str) -> agent_pb2.ModelFacts:
    model = types_pb2.Model(name="m", source=types_pb2.ModelSource(path=path))
    return host(folder)._inspect(agent_pb2.PoolDirective(model=model))


def test_tp_above_the_kv_heads_is_not_legal_on_cpu(tmp_path: Path) -> None:
    """SGLang's CPU backend does not replicate KV heads."""
    assert list(facts(tmp_path, str(tiny_llama(heads=8, kv_heads=1, layers=2))).legal_tp) == [1]
    assert list(facts(tmp_path, str(tiny_llama())).legal_tp) == [1, 2, 4, 8]


def test_a_checkpoint_that_is_not_there_is_a_problem_that_names_it(tmp_path: Path) -> None:
    assert "/not/there" in facts(tmp_path, "/not/there").problem
