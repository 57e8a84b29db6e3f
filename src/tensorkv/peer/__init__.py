"""What every process of a job shares: proof of the token, waits that name who is missing, memory of two ends.

THEORY OF OPERATION

A connection begins with the handshake (`handshake.py`). Until that is over the accepting side counts the
connection as a newcomer (`admission.py`). What a call waits for afterwards, it waits for through a `Wait`
(`deadlines.py`). Two processes of one host may share memory (`shm.py`). A setting that has travelled becomes
an updater again (`code.py`).

STATE, AND WHO CHANGES IT
    handshake   none between connections; each handshake runs in one thread, on its own connection
    admission   the connections in their handshake, oldest first; any thread, under the object's condition
    deadlines   one `Wait` per call: the thread that waits ticks it, whoever receives calls `answered`
                the list of calls that wait in this process, weakly held; under the module's lock
    shm         segments of the peer: in a worker the leader of the link has them, in a server its loop
    code        the functions of an embedded job, in a list that only grows

RULES OF THE HANDSHAKE
1. The token itself is never sent. Each side sends 32 fresh random bytes and proves the token by an HMAC over
   both nonces and the role and rank of the connecting side. Proofs of the two directions differ in their
   first word, so a proof that is sent back proves nothing. A replay fails because the nonces are new.
2. A side without a token lets nobody in, and introduces itself to nobody.
3. Until a side has verified the other's proof, it takes messages of at most 4 KiB, of the handshake's own
   types, without payload. Then it raises the bound to that of the codec.
4. The accepting side verifies the proof before it asks whether role and rank are welcome. A place in the job
   is given away once, under a lock; nobody can take it after that.
5. A refusal travels as its own error (Reject). The connecting side raises it, and does not try another way.
6. The accepting side allows the handshake two minutes in all, however slowly the bytes come. The connecting
   side waits up to the job's timeout and logs whom it waits for. So a process that is stopped in its
   handshake is not lost by that.
7. At most so many newcomers as the job has processes, and 64 more, are in their handshake. One more shuts
   down the oldest. A process of the job needs only a moment, so it still gets in while strangers connect and
   say nothing.
8. A worker reaches a server through its Unix socket if it can, else through TCP. The Unix socket proves that
   both share the host; `transport/unix.py` also refuses a peer of another user. `transport="shm"` forbids
   TCP.

RULES OF A WAIT
1. A wait ends with its result, with the failure of the job, or with its deadline. Every loop that waits ticks
   several times a second, and a tick looks at the failure first.
2. A wait that lasts writes a line every ten seconds that says for whom. It asks the other side (AskWaiting),
   which answers with ranks and a place. Where nobody can be asked, or nobody answers, the other side itself
   is named.
3. At the deadline it asks once more and allows two seconds for the answer. An earlier answer does not count
   then. WaitTimeout says the same as the log.
4. Of several answers (a call may ask every server) one that names ranks counts.
5. A lock that is held across replies is acquired through `taken`, with the wait's deadline.

LOSSES
The scheduler alone declares another process lost. It is told of the end of every process, so its word names
the cause. A worker whose server vanishes therefore waits two seconds for that word before it gives its own
(`schedulers_word`). A process whose own connection to the scheduler ends says that the scheduler is gone.

MEMORY SHARED BY BOTH ENDS
Each end hands over segments of its own, by descriptor, and the other maps them. Only the control segment,
number 0, which the worker makes, is written by both. It has one counter, written by the worker: how many
replies it has copied. And it has one flag per loan: the worker clears it before it queues the push that names
the loan, and the server sets it when it has used the memory, or the worker itself when it does not push after
all. So each field has one writer at a time, and no lock reaches across processes. What a peer says of its
memory is checked before use: a new number, a bounded number of segments, a place inside a known segment,
never segment 0. `transport/segments.py` checks the size and the seals.

WHAT IS HARD
* A quick call must not pay for this. A `Wait` enters the list only when it first ticks; a call that is
  answered at once never does. The list is weak, so a call that ends need not leave it.
* The answer comes in another thread, perhaps after the deadline or for a question of SIGUSR1. Each `Wait`
  knows whether a question is open and whether the next answer is for the log.
* Ctrl-C may come when a lock is taken and nothing knows yet. `taken` uses a lock that knows its thread, and
  releases it if this thread has it, however the wait ended.

WHAT WAS REJECTED
* Heartbeats: a process that is only busy would miss them (`docs/architecture.md`).
* A short limit for the handshake: a process that was stopped meanwhile was lost by it (git log).
* A message per returned loan or copied reply: it would cost both ends more than it tells (`server/shm.py`).
* Waiting for a lock itself: such a call had no deadline, and could not say for whom it waited (git log).

FILES
Pure: `code`. Shells: `handshake`, `admission`, `deadlines`, `shm`.
"""
