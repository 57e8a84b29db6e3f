"""FolderFiles: what is written is whole on disk, and is read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tensorkv.checkpoint.folder import Saving, file_name
from tensorkv.checkpoint.records import FileRecord, KeyRecord
from tensorkv.checkpoint.slices import slice_state
from tensorkv.errors import LoadError, SaveError
from tensorkv.server.statefiles import FolderFiles


def test_what_is_written_is_read(tmp_path: Path) -> None:
    files, folder = FolderFiles(), str(tmp_path)
    each = slice_state("w", torch.arange(6.0), 2, {"step": torch.tensor(1.0)})
    with Saving(folder) as save:
        name = save.file_name(0, 0)
        file, pieces = files.write(folder, name, [("w", 0, 6, each)])
        assert (tmp_path / name).stat().st_size == file.size_bytes
        files.check(folder, {name: file})
        with pytest.raises(LoadError, match="is not as it was saved"):
            files.check(folder, {name: FileRecord(file.size_bytes, 1)})
        with files.open(folder) as saved:
            found = saved.load(KeyRecord("w", (6,), "float32", False, pieces), 1, 3)
    assert found.value.tolist() == [1.0, 2.0]
    assert (found.version, found.state["step"].item()) == (2, 1.0)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    files, folder, name = FolderFiles(), str(tmp_path / "nowhere"), file_name("0123456789abcdef", 3, 0)
    with pytest.raises(SaveError, match=f"server 3 on host .*{folder}.*they all share"):
        files.write(folder, name, [])
    with pytest.raises(LoadError, match=f"{folder}/{name}.*cannot be read"):
        files.check(folder, {name: FileRecord(1)})
