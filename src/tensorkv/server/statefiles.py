"""FolderFiles: the files of saves, in folders of this host's file systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from tensorkv.checkpoint.files import PieceReader, check_files, write_slices
from tensorkv.checkpoint.records import FileRecord, PieceRecord
from tensorkv.checkpoint.slices import SliceState
from tensorkv.plain import Key
from tensorkv.server.checkpoint import StateFiles


@final
class FolderFiles(StateFiles):
    """Writes and reads safetensors files. Blocks its caller meanwhile."""

    def write(
        self, folder: str, name: str, slices: Sequence[tuple[Key, int, int, SliceState]]
    ) -> tuple[FileRecord, list[PieceRecord]]:
        """Write slices to a file that is complete on disk when this returns. Raises SaveError."""
        return write_slices(folder, name, slices)

    def check(self, folder: str, files: Mapping[str, FileRecord]) -> None:
        """Read whole files to check that they are as they were saved. Raises LoadError."""
        check_files(folder, files)

    def open(self, folder: str) -> PieceReader:
        """Open the files of the save in a folder for reading."""
        return PieceReader(folder)
