"""What is saved of a store: as records, in memory, and as files in a folder.

THEORY OF OPERATION

A save is an index and parts. The index says which elements of which key lie in which part, with their
version, the optimizer's state and the settings. The parts have the numbers. A value is saved in the slices in
which it lay, and loaded in any others: so the number of servers may change between the two. `docs/saving.md`
describes the format, `records.py` its meaning, and `folder.py` at its top how a save comes to count.

STATE, AND WHO CHANGES IT
    in memory    records, which are frozen, and slices, which are copies: nothing of a store is changed here
    the folder   `tensorkv.json`, the index that counts; parts, whose names have the random id of their save;
                 and for each save in progress a claim, a file that its leader keeps locked
In a job the worker that leads makes the claim and the index, and each server, in its loop, writes parts of
its own and reads from any. A store in one process does both in the thread of the call. There is no lock
within a process. Processes are kept apart by the names, and by the lock of the claim.

RULES
1. A save counts from one rename on: its claim becomes the index. Before that the folder has the save before.
2. All parts, and their names, are on disk before the rename. Who writes a part syncs it; the leader looks for
   each part and its size, syncs index and folder, renames, and syncs the folder again.
3. A part is created, never opened for writing: it must not exist, and links are not followed. Besides the
   index only files with the name of a part are read, and only files of a save are ever removed.
4. A part of another save is removed only if that save can never count, or counted once and the index names it
   no more.
5. Nothing in a save is executed or unpickled. Functions and classes are in it by name.
6. Every length in a file is compared with the file before memory is taken for it.
7. The pieces of a key are in order and without gaps. Tensors of its state go element by element with it or
   belong to a piece as a whole; the latter are the same in all pieces, so the first piece's counts. The
   version of what is joined is that of the piece that is least far. Pieces with different kinds of state are
   not joined.
8. State that cannot be copied, or that is neither tensor nor plain data, is refused before its part is
   written.

THE LIFE OF A SAVE AND OF A LOAD
The leader makes the claim, locks it and removes what crashes have left. Then each server copies a batch of
slices and writes them to a part, batch by batch; its record tells size and checksums. The leader touches the
claim at each answer. It publishes the index, and removes the parts of the save before.
A load reads the index and looks into each part: size, names, dtypes and shapes. In a job the leader then has
the scheduler make new generations of the keys. Servers read their slices, and each part is read wholly by one
of them, with a batch that it loads anyway, to compare the checksums. Settings and state are installed at the
end. If anything fails before, the new generations are deleted and the store is as it was.
`state_dict` and `load_state_dict` do the same with one dict, through the memory of the leader (`slices.py`).

WHAT IS CHECKED AT READING
The index: its checksum, types, version, settings, names of files, keys, pieces without gap or overlap, state
only where an optimizer holds, and for the known ones of torch the names that their state has. The parts:
size, header, the tensors that the index promises, checksums. Checksums find damage, not intent: whoever can
write the folder can change both.

WHAT IS HARD
* A claim that is new and not yet locked looks like that of a dead process. Its maker locks it and then asks
  whether it is still there; if not, it makes another.
* A lock may not reach other machines. A claim has its machine in its name; elsewhere, and without locks, a
  claim is dead only when it has not been touched for `STALE_S`. Both times are of files, so by one clock.
* The order of the clean-up is files, claims, index: an id counts only once, so a save that is in none of the
  later two when they are read is not needed.
* A server that writes on after its save was given up. It looks for the claim before and after, and removes
  its part if the claim is gone. The same look shows a folder that is not shared.
* A save that comes to count during a load. `load_newest` begins again if the index has changed meanwhile.

WHAT WAS REJECTED
* The safetensors library, though not its format: temporary files that stay, mode 0600, other dtypes in each
  version, and mapped files, which end the process when they are cut (`tensorfile.py`).
* A CRC-32 of all bytes: it takes longer than to load them. Sums of rows are enough for a changed word; sums
  of columns find bits that make up for each other in a row (`tensorfile.py`, git log).

FILES
No sockets, threads or clocks. `records` (no torch, no files) and `slices` (no files) are pure in every sense;
`files` (slices to files and back), `folder` (claims and the index) and `tensorfile` (one part) use the file
system.
"""
