"""Training: a torch optimizer whose steps the servers make, and what a script needs around it.

THEORY OF OPERATION
A `DistributedOptimizer` (`optimizer`) looks to a script, and to the frameworks that drive one, like the
optimizer it was made from: the same groups, options, hooks and `state_dict`. Its step is an exchange with a
store: push the gradients, let the servers' optimizer combine them with the weights, pull the weights.

State. Frameworks wrap optimizers: Lightning's wrapper is an instance of a class made on the fly, with a copy
of our `__dict__`, and runs our methods on itself. What a method writes to `self` is lost there. So everything
that changes is in one object, `Remote` (`remote`), which all copies share: the inner optimizer, whose groups
are ours, the store, the keys, and what was sent last. The inner optimizer never steps; its `state` is empty
but while a checkpoint is loaded.

Keys are the names of the parameters that require a gradient and that the inner optimizer has. Each is in the
store under its name. Frozen parameters and buffers are never in that store: they are shared once, at the
start (`start`).

The same start. The workers compare descriptions of model and optimizer before anything is initialised, in a
store of their own, which then goes. A difference is one error, with the same text on every worker: a worker
that went on alone would wait for the others until its deadline. Then weights and buffers become rank 0's.

A step sends, in this order: values that the script has changed, options that differ from those sent last,
gradients.
Values: a script may load a checkpoint into the model, or clamp a weight. Torch counts in-place changes of a
    tensor;
so does our pull, whose count is noted. If there were others, rank 0 puts its values first. A put goes to the
servers ahead of rank 0's push, on the same connections, and a round is applied only with that push: so it is
between rounds. A change through `.data` is not counted, and so is overwritten by the next pull.
Options: all workers run the same schedule, so each sends its changes, and the servers compare
    (`server/options.py`).

A checkpoint is torch's own dict. On the way out (`states`) the servers' state is read by one worker alone,
since most frameworks save on rank 0 only. On the way in, the state goes into the inner optimizer first, which
completes it as its class does for old checkpoints, and from there to the servers, together with rank 0's
present weights: whether the model's checkpoint was loaded before or after the wrap, the store has it. A load
replaces the store's keys, so the keys are initialised anew and counted from 0.

Rejected: an optimizer that is duck-typed (Accelerate returns it from `prepare` unwrapped, without a word);
    the
store's keys as the parameters' numbers (a group that is added moves them); `state` as an empty dict (torch's
distributed checkpoints then call `step` at every save, to create one).
"""
