"""What a stage does before and after its processes: one a state folder, and what a killed one left goes."""

import json
from pathlib import Path

import pytest

from nitsum_local.stage import Stage, StageBusy


async def test_two_stages_do_not_share_a_state_folder(tmp_path: Path) -> None:
    async with Stage(tmp_path, {}, ()):
        with pytest.raises(StageBusy, match="another one runs"):
            await Stage(tmp_path, {}, ()).__aenter__()
    async with Stage(tmp_path, {}, ()):
        pass


async def test_what_a_killed_stage_left_goes_with_the_next_and_nothing_else(tmp_path: Path) -> None:
    left, other = tmp_path / "nitsum-left", tmp_path / "other"
    for folder in (left, other):
        folder.mkdir()
        (folder / "x").touch()
    (tmp_path / "state").mkdir()
    (tmp_path / "state/folders.json").write_text(json.dumps([str(left), str(other)]))
    async with Stage(tmp_path / "state", {}, ()) as stage:
        folders = stage.run_dir, stage.memory_dir
        assert all(f.is_dir() for f in folders)
        assert not left.exists()
        assert other.exists()
    assert not any(f.exists() for f in folders)
