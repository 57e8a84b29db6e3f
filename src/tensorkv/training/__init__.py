"""Training: a torch optimizer whose steps the servers make, and what a script needs around it.

THEORY OF OPERATION
A `DistributedOptimizer` (`optimizer`) looks to a script, and to the frameworks that drive one, like the
optimizer it was made from: the same groups, options, hooks and `state_dict`. Its step is an exchange with a
store. Where the update runs makes two kinds of `Steps` (`steps`):

- `servers`: push the gradients, let the servers' optimizer combine them with the weights, pull the weights.
  Keys are the names of the parameters that require a gradient.
- `workers`: push the gradients, pull their mean, and let the inner optimizer make the step here. Keys hold
  means. One more key says which parameters have a gradient at all: the value of a key that nobody has pushed
  to is an old one.

State. Frameworks wrap optimizers: Lightning's wrapper is an instance of a class made on the fly, with a copy
of our `__dict__`, and runs our methods on itself. What a method writes to `self` is lost there. So everything
that changes is in one object, the `Steps`, which all copies share: the inner optimizer, whose groups are
ours, the store, the keys, and what was sent last. With `servers` the inner optimizer never steps, and its
`state` is empty but while a checkpoint is loaded.

The same start (`start`). The workers compare descriptions of model and optimizer before anything is
initialised, in a store of their own, which then goes. A difference is one error, with the same text on every
worker: a worker that went on alone would wait for the others until its deadline. Then weights and buffers
become rank 0's. Frozen parameters are shared at the start only; the store does not hold them.

A step with `servers` sends, in this order:

1. Values that the script has changed: it may load a checkpoint into the model, or clamp a weight. Torch
   counts in-place changes of a tensor, our pull among them, whose count is noted. If there were others, rank
   0 puts its values. A put goes to the servers ahead of rank 0's push, on the same connections, and a round
   is applied only with that push: so it is between rounds. A change through `.data` is not counted, and so is
   overwritten by the next pull.
2. Options that differ from those sent last. All workers run the same schedule, so each sends its changes, and
   the servers compare (`server/options.py`).
3. Gradients. With clipping, a GradScaler or `skip_nonfinite` they only merge, and a commit applies them.

With `overlap="backward"` gradients leave during backward (`overlap`). 1 and 2 then go ahead of the first of
them, and what changes afterwards is an error. Shared weights (`weights`) must stay until all workers have
come to their `step`, so those gradients only merge, and a commit applies them. With `overlap="forward"` a
step asks for the weights, and the next forward awaits them block by block (`latepulls`).

Buffers (`buffers`) are exchanged after the step, in a store beside: only those that the first step has
changed on some worker. Values are compared there, since BatchNorm does not count its changes.

A checkpoint is torch's own dict. On the way out (`states`) the servers' state is read by one worker alone,
since most frameworks save on rank 0 only. On the way in, the state goes into the inner optimizer first, which
completes it as its class does for old checkpoints, and from there to the servers, together with rank 0's
present weights: whether the model's checkpoint was loaded before or after the wrap, the store has it. A load
replaces the store's keys, so the keys are initialised anew.

Rejected: an optimizer that is duck-typed (Accelerate returns it from `prepare` unwrapped, without a word);
numbers of parameters as keys (a group that is added moves them); `state` as an empty dict (torch's
distributed checkpoints then call `step` at every save, to create one); the version counters alone to notice
clipping (Trainer clips to infinity to learn the norm, which counts as a change).
"""
