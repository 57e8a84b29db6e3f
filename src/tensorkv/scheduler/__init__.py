"""The scheduler: knows who is in the job, and what each store has agreed on. It holds no values.

THEORY OF OPERATION

STATE
`Membership` is the job:
- `_processes`: by role and rank, who has registered, where a server listens, and whether the process is gone.
- `_goodbyes`: workers that have left in good order. `_dropped`: lost workers that the job goes on without.
  `lost`: the loss that has ended the job.
- `_stores` by number, `_by_name`, and `_commits`, what servers have reported of commits under way.
- `_placement`, shared by all stores: the bytes that each server holds, and the next key id and slice id.

A `Catalog` (in `catalog`) is one store:
- `left`: ranks that have left it. All other ranks are members, also one that has not opened it yet. The
  lowest member is the *setting rank*.
- `_keys`: by name the keys that exist: the entry, what init said of it, and which ranks have initialised and
  which have deleted it. Of a key that all have deleted nothing is kept.
- `_creating`, `_loading`: what a rank is doing on the servers at the moment.
- `_settings`: the log of settings, and how many each rank has made. `_gathering`: a save or load.
- `_waiting_inits`, `_waiting_settings`, `_barrier`: calls that wait, each with rank and request.

WHO MAY CHANGE IT
Each connection has a thread, which reads one message at a time and handles it under `SchedulerServer._lock`.
Threads of the launcher come in by `worker_exited`, `worker_failed`, `report` and `stop`, under the same lock.
The answers are encoded and queued under it too (`_flush`), so every process gets them in the order of the
decisions. They are sent without it (`_pump`), so a process that does not read holds up nobody. The state
machines know no lock, no clock and no socket; deadlines belong to the callers.

RULES
Of the job:
1. A place (role and rank) is given away once. A connection that has ended never comes back within a job.
2. Workers are told the servers' addresses when all servers have registered.
3. A process is lost when its connection ends without a Goodbye, when it sends Abandon, or when the launcher
   has seen it fail after it had registered, even after a Goodbye. What ends after the last worker has gone is
   no loss.
4. The job goes on without a lost worker if that had registered, another worker is left, and every open store
   of which it is a member (if it is a member of none: every open store, and at least one) says
   `on_worker_loss="continue"`. Any other loss, and always that of a server, ends the job. The first such loss
   is the cause that all processes are told.
5. A dropped worker has left every store, also those of later. What it still says is not heard.
6. A store lives from its first JoinStore until no member is left. Its number, key ids and slice ids are never
   used again.
Of a store:
7. Only the setting rank creates keys and makes settings. It proposes, is told to lead, does it on the
   servers, and concludes. If it leaves in between, that is withdrawn, and the next setting rank leads when it
   makes the same call.
8. A rank initialises a key once, and must agree with what is there, or is refused. After it has deleted the
   key, its next init waits until every member has. So a key is gone before the next of its name is made. A
   rank's k-th setting is matched with the k-th that was made; it must agree too, and waits while there is
   none.
9. A list of inits is answered whole: it waits, or is refused, for all its keys. A refused call has not been
   made and does not count. A setting that the servers have refused does count: other ranks that make it get
   the same error.
10. A barrier opens when every member has arrived. A gathering begins when every member has asked for the same
    call.
11. A commit is decided when all servers have reported it: one error, skip or value that is not finite stops
    all.

THE LIFE OF A MESSAGE
One thread accepts connections, and each gets a thread of its own (`_serve`), which runs the handshake, takes
the place, and then reads. `Membership.handle` checks that this process may send this message now, and gives
it to the `Catalog` of its store. If another thread of the worker has closed that store, the request fails.
The directory records the call. After each change `_retry` tries all waiting inits and settings again, until a
pass answers none, and then the gathering and the barrier. `_collect` takes the answers over and ends the
store if nobody is left in it. `_flush` queues them and `_pump` sends.

WHAT IS HARD
- *A leader that dies half-way.* What a rank creates on the servers is noted until it concludes.
  `_drop` collects this (`unfinished`) before the worker leaves its stores, because leaving withdraws it, and
  sends it to the servers, which drop those slices. The next leader may be quicker than that message: its
  slices have ids of their own, so neither disturbs the other.
- *A late conclusion.* It is passed over: the key id is no longer in `_creating`, and the setting with that
  number has another leader.
- *Giving up.* A call that waits here is withdrawn and refused when its caller's deadline has passed. If its
  reply is on the way, the call was made and counts for the other ranks, so nothing is refused. What a rank
  leads is not withdrawn.
- *Deletes.* A rank tells the servers first and then, without waiting, the scheduler, which forgets a key when
  every member has told it. A server finds out for itself when it may drop a slice, and may be later than an
  init of the same name: the new slices have ids of their own. No push can be taken for one to the new key, as
  nobody that may still push to the old one has been told of the new one. A rank that leaves has deleted all.
  A delete of a key that a load has replaced meanwhile does nothing.
- *Placement.* Where slices go is decided once, when a key is created: by the newest setting for that key that
  was not refused, also one under way; for a load, by the settings of the save. The bytes counted for a server
  are taken back when an init or load fails, and when a key is deleted or replaced, or ends with its store.
- *Settings.* A setting that every member has made is forgotten. A rank that makes none would hold back all
  others, so at most the newest 1024 are kept, apart from those under way. A forgotten setting agrees with
  anything. The log keeps of it only for which keys its updater works element by element: placement asks that.
- *Saves.* A save needs two gatherings. In the first the ranks only meet. Then each holds back what its other
  threads do to the store, flushes what they have sent, and comes to the second, which the lowest rank leads.
  If the leader leaves, the others get an error; a rank that comes while another leads waits for the next
  call.
- *Loads.* A load makes new keys beside the old ones. They replace those when the leader concludes. Each rank
  is told which keys it had and must delete on the servers. Inits and settings of all ranks are counted anew:
  the next init of such a key checks only shape and dtype.
- *Commits and losses.* Servers hear of a loss at different times, so what a lost worker has asked for stands
  (see `server/`). A report for a store that has ended is passed over.
- *Latecomers.* A process that registers late is told what it has missed: who has left, who was dropped, or
  the loss that ended the job.
- *Last words.* `worker_failed` waits until the last message of that worker is handled, for a second at most,
  because children of the worker may hold its connection open.

REJECTED
- Heartbeats: a process that is only busy could miss them. The kernel watches these connections
  (`notice_silence`), and only these.
- Keeping all settings: a job that makes settings again and again took ever more memory.
- A delete by one rank for all: keys needed generations, which every worker had to be told of, and servers and
  workers had to remember what was deleted for those that did not know it yet.
- Changes of options as settings: the four round trips of one took as long as a step over 50 keys.
- Letting a rank wait for a setting that the setting rank would be refused too (an updater for whole values
  where a key is sliced): it is never made, so each rank is refused at once.
- One gathering for a save: a worker that holds its pushes back before the others have come may be the one
  they wait for.
- Waiting for the news that the starter of this scheduler is lost before refusing newcomers: they may belong
  to the launcher's next attempt, and neither to let them in nor to call the rank taken would be right
  (`_over`).
- Torch: importing it takes over a second. So norms are put together in plain Python, in `norms`.

FILES
Shell: `loop` (listener, threads, connections).
Pure: `membership` (processes, stores, losses), `catalog` (one store: keys, placement, barriers, leaving; and
`CommitReduction`), `settings` (the log), `collectives` (gatherings for save and load).
"""
