"""Updaters: how they combine a round's sum with the stored value, and how they travel by name.

THEORY OF OPERATION

A setting says which updater applies to which keys, with which options (`settings.py`). An `UpdaterSpec`
describes the updater as plain data (`spec.py`), and its owner, a server or a store in one process, makes the
`Updater` from it. When rounds are merged the owner passes the updater one `Update` per slot and gets one
result per slot: None, or the error. A slot is a whole value, or one slice of it. The top of `optimizer.py`
explains how torch's optimizers are run.

STATE, AND WHO CHANGES IT
    settings     the setting for all keys, those for some keys, and in each the updater and its options
    updater      the optimizer's state per slot; loaded state is kept aside until the slot's first update
    functions    the scripts whose definitions this process has executed
    fusing       which fused kernels were tried, and whether they are correct
    parameters   which parameter of a model a key was initialised with, held weakly
Nothing here has a lock or a thread. The owner of settings and updaters makes one call at a time: a server
from its loop, a store in one process under its lock. A worker has a settings table, too, to check settings
before they travel; it changes a copy, and adopts the copy once the setting is made. `functions` and `fusing`
cache their results for the whole process; two threads that look at once only do the work twice.

RULES
1. An updater fails for its own key only. The slot that failed keeps value and state, the others are updated.
   Errors are returned, not raised; only Ctrl-C is raised.
2. The pushed tensor belongs to the call. An updater keeps no view of it, and a user's function gets a copy.
3. The other slots of a call do not change how a slot is rounded. So slots are grouped by dtype, device and
   whether they have state, and class, dtype, device and options alone decide between fused and loop.
4. Only an elementwise updater may see slices. All others see whole values: a user's function unless set with
   `elementwise=True`, and every optimizer that is not known to be elementwise (`is_elementwise`).
5. State survives a setting that asks for what applies already, or that repeats the call which made it. Any
   other setting starts afresh. This is decided key by key. `set_options` keeps the state.
6. Options come with each call. They are tried on a small parameter before a setting is made, and must be
   plain data. `may_travel` is the only rule for what can be sent and saved.
7. No code travels, only names. A server finds a name in torch.optim, in TensorKV, in modules that the
   launcher allowed, or among the definitions of the job's script. It refuses any other before it imports
   anything, and calls a class as an optimizer only if it is a subclass of `torch.optim.Optimizer`. If the
   servers are threads of the worker's process, any function will do.
8. The text of the script alone decides what is a definition, so worker and server agree. A hash shows whether
   both read the same text. The worker refuses a function that needs names which the definitions lack.

FUSED, LOOP, COPY
The named updaters write the stored value directly. A known elementwise optimizer works on the stored values
themselves. *Fused*: one kernel call for all slots of a group, if the kernel gives the results of the loop;
`fusing.py` tries each kernel once. *Loop*: torch's operations, in batches, with copies kept until the step is
done. Every other optimizer and every user's function works on a *copy* of the value (and state), which
replaces the original only on success.

WHAT IS HARD
* A step may fail midway. A fused kernel checks its arguments before it changes a value, but after it counts
  the steps: the count is reverted. A loop may have changed some values: the batch is rolled back. Both then
  retry each slot by itself, so only the slot that fails fails.
* The bits must depend on nothing but the data. torch rounds half precision differently in full vectors and in
  the tail. So the loop gets large values in blocks, cut at multiples of `CUT_ELEMS`, as servers cut values.
* State may be loaded before its code is there. A save has functions and foreign classes by name only. A
  placeholder updater keeps the state and refuses to update until the same name is set again.
* An optimizer object may have groups. Only class and options go to the servers, and `groups.py` verifies that
  they make the same groups. An optimizer that has made steps is refused: its momentum would be lost.

WHAT WAS REJECTED
* Pickled functions and optimizers: nothing from the network is ever unpickled (`docs/security.md`).
* Executing the whole script on a server: most scripts train when they are run (`definitions.py`).
* Trusting fused kernels: one of torch's leaves full vectors of half-precision values unchanged (`fusing.py`).
* Slots with and without momentum in one call: fused SGD takes momentum of all or of none (`optimizer.py`).
* Sending every option of an optimizer object: an explicit `foreach=None` would choose another way to step
  (git log).

FILES
All are pure: no socket, thread or clock. `functions` reads the script. `spec`, `functions` and `definitions`
do without torch. `base` (the contract; assign, add, functions), `optimizer`, `undecorated` (how torch's are
built and stepped), `fusing`, `settings`, `groups` (optimizer objects), `parameters` (models' parameters),
`spec`, `functions` (names to code and back), `definitions` (which parts of a script are executed).
"""
