"""Saves of a store: as records, in memory, and as files in a folder.

THEORY OF OPERATION

A save is an index and parts. The index says which elements of which key lie in which part, with their
version, the optimizer's state and the settings. The parts hold the numbers. A value is saved in the slices it
had and can be loaded into any others, so the number of servers may change in between. `docs/saving.md`
describes the format, `records.py` its meaning, and the top of `folder.py` how a save is published.

STATE, AND WHO CHANGES IT
    in memory    records, which are frozen, and slices, which are copies: this code changes nothing of a store
    the folder   `tensorkv.json`, the current index; parts, whose names contain the random id of their save;
                 and for each save in progress a claim, a file that its leader keeps locked
In a job the leading worker writes the claim and the index; each server, in its loop, writes its own parts and
reads any. A store in one process does both in the calling thread. There is no lock within a process. The
names, and the lock of the claim, keep processes apart.

RULES
1. One rename publishes a save: its claim becomes the index. Until then the folder holds the previous save.
2. All parts, and their names, are on disk before the rename. The writer of a part syncs it; the leader checks
   that each part exists and its size, syncs index and folder, renames, and syncs the folder again.
3. A part is created, never opened for writing: it must not exist, and links are not followed. Besides the
   index only files with the name of a part are read, and only files of a save are ever removed.
4. A part of another save is removed only if that save can never be published, or was and the index no longer
   names it.
5. Nothing in a save is executed or unpickled. It holds functions and classes by name.
6. Every length in a file is compared with the file's size before memory is allocated for it.
7. The pieces of a key are in order and without gaps. A tensor of its state is either elementwise or belongs
   to a piece as a whole; the latter are equal in all pieces, so the first piece's is used. Joined pieces get
   the smallest of their versions. Pieces with different kinds of state are not joined.
8. State that cannot be copied, or that is neither tensor nor plain data, is refused before its part is
   written.

THE LIFE OF A SAVE AND OF A LOAD
The leader creates the claim, locks it and removes leftovers of crashes. Then each server, batch by batch,
copies slices and writes them to a part; the part's record holds size and checksums. The leader touches the
claim at each answer. It publishes the index and removes the parts of the previous save.
A load reads the index and inspects each part: size, names, dtypes and shapes. In a job the leader then has
the scheduler make new keys beside those that it replaces. Servers read their slices. One also reads each part
completely, with a batch that it loads anyway, to compare the checksums. Settings and state are installed at
the end. If anything fails before, the new keys are dropped and the store is unchanged.
`state_dict` and `load_state_dict` do the same with one dict, through the memory of the leader (`slices.py`).

WHAT IS CHECKED AT READING
The index: its checksum, types, version, settings, names of files, keys, pieces without gap or overlap, state
only for keys with an optimizer, and for torch's known optimizers the names of their state. The parts: size,
header, the tensors that the index promises, checksums. Checksums detect damage, not tampering: an attacker
who can write to the folder can change both.

WHAT IS HARD
* A claim that is new and not yet locked looks like that of a dead process. Its creator locks it and then
  checks that it still exists; if not, it creates another.
* A lock may not work across machines. A claim has its machine in its name; from another machine, or without
  locks, a claim is dead only if it has not been touched for `STALE_S`. Both times are file times, so they
  come from one clock.
* The clean-up lists files, then claims, then reads the index: an id is published only once, so a save found
  in neither of the last two is not needed.
* A server may keep writing after its save was abandoned. It looks for the claim before and after, and removes
  its part if the claim is gone. The same check detects a folder that is not shared.
* A save may be published during a load. `load_newest` starts over if the index has changed meanwhile.

WHAT WAS REJECTED
* The safetensors library, though not its format: it leaves temporary files behind, uses mode 0600, knows
  other dtypes in each version, and maps files, so that truncating one kills the process (`tensorfile.py`).
* A CRC-32 of all bytes: it takes longer than loading them. Row sums detect a changed word; column sums detect
  changed bits that cancel out within a row (`tensorfile.py`, git log).

FILES
No sockets, threads or clocks. `records` (no torch, no files) and `slices` (no files) are pure in every sense;
`files` (slices to files and back), `folder` (claims and the index) and `tensorfile` (one part) use the file
system.
"""
