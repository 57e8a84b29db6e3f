"""Code that every role of a job shares: the handshake, waits that name who is missing, and shared memory.

THEORY OF OPERATION

A connection begins with the handshake (`handshake.py`). Until that is over, the accepting side counts the
connection as a newcomer (`admission.py`). Afterwards every call waits through a `Wait` (`deadlines.py`). Two
processes of one host may share memory (`shm.py`). A server turns a received setting into an updater
(`code.py`).

STATE, AND WHO CHANGES IT
    handshake   none between connections; each handshake runs in one thread, on its own connection
    admission   the connections in their handshake, oldest first; any thread, under the object's condition
    deadlines   one `Wait` per call: the waiting thread ticks it, the receiving thread calls `answered`
                the list of waiting calls of this process, weakly held; under the module's lock
    shm         segments of the peer: in a worker the leader of the link owns them, in a server its loop
    code        the functions of an embedded job, in a list that only grows

RULES OF THE HANDSHAKE
1. The token itself is never sent. Each side sends 32 fresh random bytes and proves the token by an HMAC over
   both nonces and the role and rank of the connecting side. The proofs of the two directions differ in their
   first word, so a reflected proof proves nothing. A replay fails because the nonces are new.
2. A side without a token lets nobody in, and introduces itself to nobody.
3. Until a side has verified the other's proof, it accepts only messages of the handshake, of at most 4 KiB
   and without payload. Then it raises the limit to that of the codec.
4. The accepting side verifies the proof before it checks role and rank. It assigns each place in the job
   once, under a lock; no other process can take the place after that.
5. A refusal travels as its own error (Reject). The connecting side raises it, and does not try another way.
6. The accepting side allows the handshake two minutes in all, however slowly the bytes arrive. The connecting
   side waits up to the job's timeout and logs whom it waits for. So a process that is stopped during its
   handshake is not lost.
7. At most so many newcomers as the job has processes, and 64 more, are in their handshake. One more shuts
   down the oldest. A process of the job needs only a moment, so it still gets in while strangers connect and
   say nothing.
8. A worker reaches a server through its Unix socket if it can, else through TCP. The Unix socket proves that
   both share the host; `transport/unix.py` also refuses a peer of another user. `transport="shm"` forbids
   TCP.

RULES OF A WAIT
1. A wait ends with its result, with the failure of the job, with Ctrl-C, or with its deadline. Every loop
   that waits ticks several times a second, and a tick looks for them in this order.
2. A long wait logs every ten seconds whom it waits for. It asks the other side (AskWaiting), which answers
   with ranks and a place. If nobody can be asked, or nobody answers, the log names the other side itself.
3. At the deadline a wait asks once more and allows two seconds for the answer. An earlier answer does not
   count then. WaitTimeout says the same as the log.
4. Of several answers (a call may ask every server) one that names ranks wins. If a server names them, the
   worker asks the scheduler whether one of them waits in a barrier or the like (AskStuck), perhaps for it.
5. A call acquires a lock that is held across replies through `taken`, with the wait's deadline.

LOSSES
Only the scheduler declares another process lost. It learns of the end of every process, so its report names
the cause. A worker whose server vanishes therefore waits two seconds for that report before it makes its own
(`schedulers_word`). A process whose own connection to the scheduler ends reports that the scheduler is gone.

MEMORY SHARED BY BOTH ENDS
Each end passes its own segments by descriptor, and the other maps them. Both write to one segment only, the
control segment, number 0, which the worker creates. It holds one counter, written by the worker: how many
replies it has copied. And it holds one flag per loan: the worker clears it before it queues the push that
names the loan; the server sets it when it has used the memory, or the worker when it does not push after all.
So each field has one writer at a time, and no lock spans processes. Before use, `shm.py` checks what a peer
says of its memory: a new number, a bounded number of segments, a place inside a known segment, never segment
0. `transport/segments.py` checks the size and the seals.

WHAT IS HARD
* A quick call must not pay for this. A `Wait` enters the list only at its first tick; a call that is
  answered at once never does. The list is weak, so a call that ends need not leave it.
* The answer arrives in another thread, perhaps after the deadline or for a question of SIGUSR1. Each `Wait`
  knows whether a question is open and whether to log the next answer.

WHAT WAS REJECTED
* Heartbeats: a process that is only busy would miss them (`docs/architecture.md`).
* A short timeout for the handshake: a process that was stopped meanwhile was lost (git log).
* A message per returned loan or copied reply: it would cost both ends more than it tells (`server/shm.py`).
* A plain wait for a lock: such a call had no deadline, and could not say whom it waited for (git log).

FILES
Pure: `code`. Shells: `handshake`, `admission`, `deadlines`, `shm`.
"""
