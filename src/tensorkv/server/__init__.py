"""The server: holds slices of values, adds up what workers push, and runs updaters.

THEORY OF OPERATION

STATE
A value lies in one or more slices. A slice has an id, which is never used again. `ServerState` has the stores
of a server; a `StoreShard` has the slices of one store:
- Each slice is in a `Cohort`, with the slices that have the same history. The cohort counts the rounds
  (`applied`) and updates, and its `inbox` has what each worker has contributed to the open round.
- A `Contribution` is one push: its buffer, its counts or weight, and `live`, the number of slices that need
  it.
- A cohort knows its members, the workers that have neither left nor deleted its slices. The `Policy` of the
  store says when a round is merged.
- `plans` has each worker's numbered lists of slices, cut into chunks. A chunk has a `Layout`: where its
  slices lie in a frame and in memory. Workers that push the same slices in the same order share the layout
  object.
- Each slice has `slot`, the memory of its value, and `setting`, its updater and options. `schedule` has the
  newest settings, and those that wait for their round.
- `_replies`, `_waits`, `_merge_waits`, `_flushes`: calls that wait. `_commit`: which workers have asked for
  it. `_saves`: which workers save alone, and the settings that they save.

WHO MAY CHANGE IT
One thread, the loop, runs all of this, updaters included. So there is no lock, and no handler blocks for
another message. `Server._lock` guards only what the threads that accept and greet connections share with the
loop. Threads that send append leases that have ended to `_released`, and the loop counts them down. Signal
handlers set a flag and write to an eventfd. Files do block the loop: a server that writes or reads a save
serves nobody meanwhile.

RULES
1. A worker's n-th push of a slice belongs to round n of that slice. In sync the round merges when every
   member has pushed it, and at least one worker has. In async each push is a round of its own.
2. A worker has at most one push of a slice that is not applied; the server refuses another.
3. A merged round is applied at once, unless it is held: then it waits for a commit.
4. Each merged round is applied once and in order, also if it is empty, skipped or failed. So a failure leaves
   no pull behind. A round adds to the version only if an update succeeded.
5. The server takes a sum when its round is applied, or for a commit when all have asked: in rank order, in
   the stored dtype (narrow floats in float32). The order of arrival has no influence, so runs repeat bit by
   bit.
6. Each slice has rounds of its own. Chunks batch the work; only a commit decides for several slices at once.
7. A push, a put, a plan or an init that breaks the protocol (`ProtocolError`) is refused before it changes
   anything, and its connection is closed. An error of the call itself is a `Failed` reply, and the connection
   lives.
8. Nothing writes to memory that has a reader: a reply holds leases until it is sent or copied.
9. A pushed buffer stays until each slice of the push is applied or dropped. Then it goes back to the pool, or
   to the worker that lent it.
10. Only the scheduler says that a worker is gone from the job. The end of a data connection alone changes no
    round.

THE LIFE OF A PUSH
`_read` receives what has come on a connection, at most 16 frames before others have their turn. When the
message of a frame is there, `_place` decodes it, compares the length of the payload with the plan, and says
where the payload goes: into a buffer of the pool, or nowhere if it lies in the worker's window. When the
payload is complete, `_take` ends finished leases and calls `ServerState.handle`, which finds the shard.
`StoreShard.push` leaves the contribution in the cohorts of its slices. If the policy finds a round complete,
`_merge` applies it, or holds it for the commit. `_apply` takes the settings that are due, adds up, runs the
updaters, releases the contributions, and answers the pulls and puts that waited. Answers gather in `out`; the
loop sends them as far as that goes without waiting, and sending threads do the rest.

WHAT IS HARD
- *Messages between the two halves of a frame.* Another worker may delete a key after `_place` and before
  `_take`. That changes nothing here: the slice stays until the worker of the frame has deleted it, too.
  `ServerState._asked` keeps the chunk between the two calls.
- *Splits and joins.* A push of part of a cohort splits it in the middle of a round; waiting calls then wait
  at both halves. Joins are for speed, and happen at rest only. `cohorts` has the rules, and what keeps a
  store from splitting and joining in each step.
- *Leases.* A lease begins when the reply is made, not when it is sent. An update that finds its slot leased
  moves the slot to fresh memory, so no reader stops a writer. Small slices share a slot: a reader of one
  moves them all. For a reply in shared memory the worker counts what it has copied; `_settle` looks at that
  count before each message.
- *Accumulators.* The first buffer of a sum may serve as the accumulator, unless it is borrowed from a
  worker's window. A commit overwrites none: if it is refused, the contributions stay for the next one.
- *Settings.* A server prepares a setting first, which may fail and changes no slice. Activated, the setting
  holds for each slice from the round after its sender's last push: setting and pushes come on one
  connection, so the number is the same for every order of arrival. In async, and with a quorum, it holds at
  once. A setting for a
  later round, made by a rank that was ahead and has left, is overtaken by one that was made after it.
- *Options.* A change of options comes with the pushes, prepared by nobody: its worker has tried it on an
  optimizer. Each server compares the changes of all workers (`options`), and reports one that differs.
- *Time.* Only a policy with deadlines knows time. It reaches the state machine as `tick(now)` alone, after
  each turn of the loop, which sleeps no longer than until the next deadline. A cohort's deadline is set at
  the first tick after its quorum; a heap of them keeps a tick cheap, and an entry whose cohort has another
  deadline by then is skipped.
- *Commits.* When all members have asked, the server adds up and reports to the scheduler, which decides for
  all servers. What a worker has asked for stands if it leaves: servers may learn of that before or after they
  report, and must do the same. A slice deleted before the decision is left out. If some workers pushed with
  apply=False and some without, the round is dropped, and the commit forgets those pushes. A flush waits for
  the decision of a commit that was reported.
- *Leaving and losses.* Both end in `leave`. It withdraws what the worker has pushed with apply=False and not
  asked to commit, then counts the worker as left, then merges the rounds that waited only for it. Of a lost
  worker the loop first takes in what has come whole, for a second at most; the slices of keys that it was
  about to create are dropped.
- *Failures.* An updater may fail for one slice: that slice keeps value and state, its contributors get a
  `Fault`, and the others are updated. If a sum cannot be taken, all slices that were merged together fail.
  If there is no memory for a payload, the loop receives it into scrap; the push counts, and its round fails
  for all who contribute.
- *Deletes.* Deleting is leaving, slice by slice: a worker first drops its plans that name a slice, then says
  that it has deleted it, and can define no such plan any more. So no push, pull or put ever names a slice
  that its worker has deleted, and none of them has to look. The cohort is split off and goes on without that
  member; the rules are those of a worker that leaves. Pulls that the worker still waits for are answered.
  When the last member is gone, nothing is open and nobody waits, except in a round that is held for a commit:
  that is finished as it is. Then the slice is dropped, and no plan names it.
- *Save and load.* A slice is saved with its optimizer's state only if the newest setting has the same
  updater. A load creates new slices beside the old ones and keeps their state in `Slice.restored`;
  `finish_restore` installs the settings, drops those that wait, and hands the state to the updaters. That all
  slices of a key are saved as of one moment is the work of workers and scheduler: see `scheduler/`.
- *A save by one worker.* In sync a slice whose last round by a worker is applied changes only by a put until
  that worker pushes again. So a server needs no copy for its save. It notes the settings that hold in the
  worker's next rounds. Settings that come meanwhile wait for their round, so that no state is dropped.

REJECTED
- A receiving thread per worker: they hand each other the interpreter in small requests, 40 us a time.
- Rows of arrays, a column for each slice: a step of one key took a server 88 us instead of 26, and the plain
  counters beside them, for lists that are pushed round after round, had to be kept equal at 14 places.
- Shared slots of a megabyte: their values lie in several chunks, and while one chunk was read, an update of
  the next moved the whole slot. 128 KiB makes that a twentieth.
- Looking through all waiting pulls at every update: each waits in the cohorts that it needs.
- Reading a lost worker until nothing more comes: it may live, and send as fast as it is read.
- A message for each chunk to return a loan or to confirm a copy: it would cost more than what it tells.
- `torch.add` with `alpha` for weights: some processors round product and sum together, and others do not.
- The norm as the test for finite values: the norm of finite elements may be infinite.

FILES
Shells: `loop` (threads, connections), `shm` (memory shared with local workers), `statefiles` (saved files).
Pure: `state` (stores, dispatch, payload lengths), `shard` (one store), `cohorts` (rounds, and who waits for
them), `policy` (when a round merges), `planbook` (lists of slices), `layouts` (slices, chunks,
contributions), `updates` (sums and updaters), `sums`, `slots` (memory of values, leases), `memory` (buffers),
`settings` (from which round), `options` (changes of options, compared), `commits` (gathering, norms),
`checkpoint` (contents of saves).
"""
