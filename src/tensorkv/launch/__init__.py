"""Ways to start a job. Only `torchrun` imports torch, in the workers, which have imported it anyway.

- `supervisor`: decides what to do when a process ends or a signal arrives; pure, no process and no clock.
- `output`: lines, prefixes and progress bars of many processes on one terminal; pure.
- `forwarder`: the thread that reads the pipes of the processes.
- `signals`: signals to the launcher, as a descriptor to wait for.
- `processes`: watches real processes under those rules, and ends them; runs any list of commands.
- `local`: scheduler, servers and workers on this machine.
- `spawn`: the same, with workers that call a function.
- `torchrun`: the job of workers that torchrun has started; they start the rest.
- `attempts`: how the workers of one attempt tell each other where their job is.
- `sidecar`: the process that runs scheduler and servers for those workers.
- `pdeathsig`, `reaper`: two small scripts that ensure that no process outlives the launcher.
"""
