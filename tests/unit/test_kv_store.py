"""The page store: any TP reads what any other wrote, the budget holds, and what is gone is a miss."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from nitsum_sglang.kv.store import PageStore, Run

HEADS, HEAD_BYTES = 8, 64


def store(folder, max_bytes: int = 1 << 20) -> PageStore:
    return PageStore(str(folder), "ns", HEADS, HEAD_BYTES, max_bytes)


def page(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEADS, HEAD_BYTES), dtype=np.uint8)


def of(run: Run, whole: np.ndarray) -> bytes:
    return whole[run.first : run.first + run.count].tobytes()


def bytes_in(folder) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != "used")


@pytest.mark.parametrize("writer", [1, 2, 4, 8])
@pytest.mark.parametrize("reader", [1, 2, 4, 8])
def test_any_tp_reads_what_any_other_wrote(tmp_path, writer, reader) -> None:
    whole = page(0)
    pages = store(tmp_path)
    for rank in range(writer):
        run = Run(rank * HEADS // writer, HEADS // writer)
        assert pages.write({"k": of(run, whole)}, run) == 1
        assert pages.write({"k": of(run, whole)}, run) == 0
    for rank in range(reader):
        run = Run(rank * HEADS // reader, HEADS // reader)
        got = bytearray(run.count * HEAD_BYTES)
        assert pages.has("k", run)
        assert pages.read("k", run, memoryview(got))
        assert bytes(got) == of(run, whole)
        assert not pages.has("other", run)


def test_a_part_is_a_miss(tmp_path) -> None:
    pages, half = store(tmp_path), Run(0, 4)
    pages.write({"k": of(half, page(0))}, half)
    assert pages.has("k", Run(2, 2))
    assert not pages.has("k", Run(0, 8))
    assert not pages.read("k", Run(4, 4), memoryview(bytearray(4 * HEAD_BYTES)))


def test_a_file_cut_short_or_gone_is_a_miss(tmp_path) -> None:
    pages, run = store(tmp_path), Run(0, HEADS)
    pages.write({"k": of(run, page(0))}, run)
    (file,) = tmp_path.glob("ns/*")
    os.truncate(file, 10)
    assert not pages.read("k", run, memoryview(bytearray(HEADS * HEAD_BYTES)))
    file.unlink()
    assert not pages.read("k", run, memoryview(bytearray(HEADS * HEAD_BYTES)))


def test_the_budget_holds_and_the_least_recently_used_goes_first(tmp_path) -> None:
    size, run = HEADS * HEAD_BYTES, Run(0, HEADS)
    pages = store(tmp_path, max_bytes=20 * size)
    for i in range(20):
        pages.write({f"k{i}": of(run, page(i))}, run)
        os.utime(pages._path(f"k{i}", run), (i, i))
    assert pages.has("k0", run, touch=True)
    pages.write({"new": of(run, page(99))}, run)
    assert bytes_in(tmp_path) <= 20 * size
    assert pages.has("k0", run)
    assert pages.has("new", run)
    assert not pages.has("k1", run)
    assert pages.has("k19", run)


def test_a_batch_over_the_budget_is_cut(tmp_path) -> None:
    size, run = HEADS * HEAD_BYTES, Run(0, HEADS)
    pages = store(tmp_path, max_bytes=10 * size)
    assert pages.write({f"k{i}": of(run, page(i)) for i in range(50)}, run) == 9
    assert bytes_in(tmp_path) <= 10 * size


def test_writers_of_every_tp_at_once_keep_the_budget(tmp_path) -> None:
    size = HEADS * HEAD_BYTES
    limit = 40 * size

    def work(tp: int) -> None:
        pages = store(tmp_path, limit)
        for i in range(100):
            for rank in range(tp):
                run = Run(rank * HEADS // tp, HEADS // tp)
                pages.write({f"{tp}.{i}": of(run, page(i))}, run)

    threads = [threading.Thread(target=work, args=(tp,)) for tp in (1, 2, 4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    # A grant that is not written yet is invisible to an eviction: one page of each writer.
    assert bytes_in(tmp_path) <= limit + 3 * size
    assert not list(tmp_path.rglob("*.partial"))


KILLED = """
import os, signal, sys
from nitsum_sglang.kv.store import PageStore, Run
if sys.argv[2] == "writing":
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
else:
    PageStore._write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
PageStore(sys.argv[1], "ns", 8, 64, int(sys.argv[3])).write({f"k{i}": bytes(512) for i in range(4)}, Run(0, 8))
"""


@pytest.mark.parametrize("when", ["granted", "writing"])
def test_a_killed_writer_leaves_a_miss_and_a_store_that_works(tmp_path, when) -> None:
    """Killed after its bytes were granted, and between writing a page and naming it."""
    size, run = HEADS * HEAD_BYTES, Run(0, HEADS)
    limit = 20 * size
    end = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when, str(limit)], timeout=60, check=False)
    assert end.returncode == -signal.SIGKILL
    pages = store(tmp_path, limit)
    partial = list(tmp_path.rglob("*.partial"))
    assert len(partial) == (when == "writing")
    assert pages.used_bytes() == 4 * size, "granted, and lost with it"
    assert not pages.has("k0", run)
    assert not pages.read("k0", run, memoryview(bytearray(size)))
    for p in partial:
        os.utime(p, (1, 1))  # longer ago than any write takes
    for i in range(40):
        assert pages.write({f"k{i}": of(run, page(i))}, run) == 1
        assert bytes_in(tmp_path) <= limit
    assert not list(tmp_path.rglob("*.partial")), "what it left is evicted like any other page"
    assert abs(pages.used_bytes() - bytes_in(tmp_path)) == 0, "the first eviction counted afresh"


def test_readers_see_whole_pages_or_none_while_others_write_and_evict(tmp_path) -> None:
    run, half = Run(0, HEADS), Run(0, HEADS // 2)
    wholes = {f"k{i}": page(i) for i in range(12)}
    done, torn, hits = threading.Event(), [], []

    def read() -> None:
        pages = store(tmp_path, 8 * HEADS * HEAD_BYTES)
        while not done.is_set():
            for key, whole in wholes.items():
                for own in (run, half):
                    got = bytearray(own.count * HEAD_BYTES)
                    if pages.read(key, own, memoryview(got)):
                        hits.append(key)
                        torn.extend([key] if bytes(got) != of(own, whole) else [])

    reader = threading.Thread(target=read)
    reader.start()
    pages = store(tmp_path, 8 * HEADS * HEAD_BYTES)  # room for 8 of 12: each round evicts
    for i in range(24):
        for key, whole in wholes.items():
            for own in (run,) if i % 2 else (half, Run(HEADS // 2, HEADS // 2)):
                pages.write({key: of(own, whole)}, own)
    done.set()
    reader.join()
    assert hits
    assert not torn


def test_namespaces_share_the_budget_and_nothing_else(tmp_path) -> None:
    """A namespace is a revision of a model: the same tokens of another one are another page."""
    size, run = HEADS * HEAD_BYTES, Run(0, HEADS)
    old, new = (PageStore(str(tmp_path), name, HEADS, HEAD_BYTES, 10 * size) for name in ("r0", "r1"))
    for i in range(10):
        old.write({f"k{i}": of(run, page(i))}, run)
    assert not new.has("k9", run)
    for i in range(10):
        new.write({f"k{i}": of(run, page(100 + i))}, run)
    assert bytes_in(tmp_path) <= 10 * size
    assert not old.has("k0", run), "the older revision's pages made room"
    got = bytearray(size)
    assert new.read("k9", run, memoryview(got))
    assert bytes(got) == of(run, page(109))
