"""Ways to start a job. Nothing in here imports torch, but `torchrun` in the workers, where it is anyway.

- `supervisor`: what to do when a process ends or a signal comes; pure, no process and no clock.
- `output`: lines, prefixes and progress bars of many processes on one terminal; pure.
- `forwarder`: the thread that reads the pipes of the processes.
- `signals`: signals to the launcher as something to wait for.
- `processes`: any list of real processes under those rules.
- `local`: scheduler, servers and workers on this machine.
- `spawn`: the same, with workers that call a function.
- `torchrun`: the job of workers that torchrun has started; they start the rest.
- `attempts`: how the workers of one attempt tell each other where their job is.
- `sidecar`: the process that keeps scheduler and servers for those.
- `pdeathsig`, `reaper`: two small scripts that see to it that nothing outlives the launcher.
"""
