"""The page store: any TP reads what any other wrote, the budget holds, and what is gone is a miss."""

import os
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
