"""The worker role: it turns the calls of a script into messages, and replies into results.

THEORY OF OPERATION

A process has one place in its job (`session.py`): a connection to the scheduler, a link to each server, and a
window of memory that the servers of its host map. All stores of the process share that place.
Each store has a pure core (`core.py`): what it knows, what may be sent next, what a reply vouches for. A call
that needs several messages, or a wait between them, is a conversation (`conversations.py`), pure as well: it
calls the core and says what to wait for. Around them is the shell: `driver.py` carries conversations out,
`pullcall.py` sends and awaits a pull, `pusher.py` gathers and sends pushes, also those of a conversation, and
`stores/dist.py` checks a call and starts it.

STATE
    session     `order`         lock, held while the messages of one call are queued to all servers
                failure         why the job is broken, None while it is not
    core        `count`         number of pushes queued so far; it numbers them
                unmerged        per key id the number of its last push, until that is known to be merged
                `deferred_of`   per key id the call with async_op that could not be sent yet
                `uncommitted`   ids of keys that were pushed with apply=False and wait for the commit
                `held`          whether calls that change the store wait, because it is being saved
    keytable    `states`        the keys that this worker knows, each with its slices
                `faults`        per key the error of an earlier round, raised by the next call on the key
    plancache   plans           by key ids, dtypes and counts, and which servers know each of them
    requests    `exchanges`     requests in flight by number, each with the object that takes its replies
    window      loans           places from which a server may still read a push

THREADS AND LOCKS
The caller's thread checks, copies, queues, sends as far as the connection takes it, and receives. Helper
threads: one per connection sends the rest, one reads the scheduler's messages, one per link receives for
requests that no caller waits in (`watch`), one runs each deferred call, and one serves signals.
`order` guards the cores of all stores, and with them the order in which messages are queued. No thread waits
for a message, or for another lock but those of the queues, while it holds `order`. The locks for one save,
one setting and one commit at a time are held across replies, so they are acquired with a deadline.
Whoever holds the lead of a link receives on it. Only the leader calls exchanges and maps segments.

RULES
1. One order. Messages that belong together are queued to all servers under `order`. So every server sees the
   calls of this worker in one order, and a plan or a segment is announced before a message names it. Nothing
   is queued for a store after its Leave.
2. Ahead. In `dist_sync` a worker has at most one unmerged push per key. Only the next push of such a key
   waits. The free keys of a list are sent at once, and each busy one when `backpressure.py` learns that it is
   merged. A key pushed with apply=False is not used at all until the commit.
3. Program order. A call with async_op that cannot be sent yet is deferred to a thread of its own. Later calls
   on its keys wait for it.
4. A pull, put, commit or merge notice vouches only for pushes queued before it (`up_to`). Later ones stay
   busy.
5. A push is checked as a whole, and copied before `order` is taken. A push that is not queued returns its
   loans.
6. A connection numbers its requests from one counter and reuses no number (`requests.py`). A reply to a
   number that was never handed out ends the connection. A reply to a call that has given up is received and
   discarded.
7. An exchange that cannot take its reply fails alone. A reply that breaks the protocol ends the connection.
8. A loan keeps its memory until the server returns it. In sync, rule 2 bounds the loans. In async at most 64
   MB per server, or one push if that is larger, are on loan; beyond that a push waits, and goes through the
   connection if nothing comes back for a while. The connection then provides the backpressure.
9. A fault is raised once, by the next call on its key, by `barrier` or by `close`. Several slices of a key
   that fail in one round make one fault.
10. A rank that leads (init, setting, save, load) concludes at the scheduler, with success or with its error.
    The scheduler names the leader, the lowest rank that is left. A leader that is given up by Ctrl-C
    concludes with that error.
11. A broken job ends every call. Each wait looks at `failure` four times a second. A failure that the
    scheduler declares also shuts the links down, which wakes their receivers.

THE LIFE OF A PUSH AND OF A PULL
`stores/dist.py` finds the plan of the list of keys. The plan says which slices travel in which frame. Both
ends keep it by number, and a step that repeats a list only looks it up. The pusher gathers each chunk,
outside of all locks: into the window, into a buffer, or as views of the caller's tensors. Under `order` the
core looks whether a key is busy or changes are held back, sends the plan to servers that lack it, and queues
one Push per chunk. A blocking push returns when no queued frame reads the caller's memory any more; in async
it awaits all frames.
A pull opens one exchange per server and queues one Pull to each. The caller then leads one link after the
other, or, for long answers over TCP, all at once. Chunks arrive in any order, and each goes to its place in
`out`, straight or by way of a small buffer. The last one finishes the call: the keys count as merged up to
`up_to`, and their faults are raised.

WHAT IS HARD
* Two threads push one key. The look under `order` decides. The loser has sent nothing, and waits for the
  merge.
* Handing the lead on. A follower is counted in `_waiting` before it looks, so the leader knows whether to
  wake anybody. The leader also ticks its deadline between frames, for frames may come for others without a
  pause.
* A deadline inside a frame. To stop there would end the connection for every call. So the leader finishes the
  frame, and gives up only when its end does not come for another `STALL_S`.
* Replies in shared memory. If the server has ended the connection while a reply was copied, the memory may
  have changed under the copy, and the copy does not count. The count of copied replies ends the server's
  leases.
* Signals. Ctrl-C is deferred to a tick of a wait, and then is like its deadline (`tensorkv/interrupts.py`):
  no other code has to expect it. What another handler raises, or a second Ctrl-C, may come between any two
  steps. Out of a critical section it makes the worker leave the job as lost: out of a block of
  `Session.whole`, a send, or a wait for replies (`Session.broken_off`). `signals.py` has the rules for
  SIGTERM and SIGUSR1.
* A save while other threads push. All workers meet. Then each begins its hold under `order`, so each call is
  queued to all servers or to none. Then a flush drains what was queued before. The meeting comes first,
  because a late worker may need what others still push. A commit notes its keys only when the hold lets it
  go.
* A save by one worker, without a meeting. It holds its other threads back only when everything that it has
  pushed is applied. If a thread has pushed again before the hold began, it ends the hold and waits anew.
* Deletes while other threads go on. Under `order` the keys become `retired`, the servers are told to drop the
  plans that name them, and then that this worker needs their slices no more. So a push or pull of another
  thread is queued before, and counts, or finds the key retired when it defines its plan, and raises
  KeyDeleted. A reply of the scheduler that is under way may still name the key: while one is, ids of retired
  keys are kept, and not learnt again. A load retires the keys that it has replaced in the same way.
* Two views of one deadline. The scheduler may have answered a request that times out here; for the others it
  has happened. So `control.py` asks to give it up, and waits a moment for a reply that is on its way.
* Who was lost. When one process dies several lose each other. A link waits two seconds for the scheduler's
  word.
* Loans of `empty_like`. A chunk is lent where it lies only if its pieces are adjacent in the window. So
  `lending.py` lays tensors out as a push of the same list cuts its chunks; other lists are copied.
* Tensors of the step before. A plan recognises them by identity and address, and keeps none of them alive.

WHAT WAS REJECTED
* A receiving thread that callers wait for: a small request would cost a change of threads (`link.py`).
* Long answers received from one server after the other: over a network the others stall (`interleave.py`).
* A message for each returned loan and each copied reply: it costs more than it tells (`server/shm.py`).
* A list of unmerged pushes: every push searched all of it, and it kept deleted keys.
* A lock for each part of the core: an order among four locks to keep, and each push took all of them.
* Ctrl-C between any two steps: fifteen files had to survive it at every one (git log).
* Raising it at once in a wait: a thread that receives may have read bytes that nobody has noted yet. So it
  waits for a tick, a quarter of a second at most.
* A save without meeting, hold or flush: `tests/server/test_interleavings.py` tears it, or makes a call hang.
* A save alone that holds other threads back from its beginning: the others may wait for what those push.
* References from its parts back to a store: the cycle kept its memory until the garbage collector came by.

FILES
Pure: `core` with `keytable` and `plancache`, `conversations`, `requests` (what is in flight on a connection),
`plans` (what a list of keys means on the wire), `transfers` and `views` (tensors to frames and back),
`devices` (copies from and to GPUs), `nontemporal` (copies that bypass the caches).
`tests/server/test_interleavings.py` drives them through queues, in every order.
All others are shells. The process: `session`, `signals`, `uncaught` (how the exception that ends a worker is
told). Connections: `control` (the scheduler), `link` (one server), `interleave` (several servers at once). A
store: `driver`, `pusher`, `backpressure`, `pullcall`, `hold`, `checkpoint` (what a leader does to save and
load). Bytes: `window`, `lending`, `latch` (frames still to be sent).
"""
