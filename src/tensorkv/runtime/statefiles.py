"""FolderFiles: the files of saves, in folders of this host's file systems."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

from tensorkv.arrays import Key
from tensorkv.protocol.savedslices import StateFiles
from tensorkv.savedstate import PieceRecord
from tensorkv.saveio import PieceReader, write_slices
from tensorkv.slicestate import SliceState


@final
class FolderFiles(StateFiles):
    """Writes and reads safetensors files. Its owner waits meanwhile."""

    def write(
        self, folder: str, name: str, slices: Sequence[tuple[Key, int, int, SliceState]]
    ) -> tuple[int, list[PieceRecord]]:
        """Write slices to a file that is whole on disk when this returns. Raises SaveError."""
        return write_slices(folder, name, slices)

    def open(self, folder: str, pieces: Iterable[PieceRecord]) -> PieceReader:
        """Open the files in which these pieces lie. Raises LoadError."""
        return PieceReader(folder, pieces)
