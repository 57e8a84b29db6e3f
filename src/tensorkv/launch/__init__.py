"""Ways to start a job. `local` runs one on this machine; nothing in here imports torch.

- `supervisor`: what to do when a process ends or a signal comes; pure, no process and no clock.
- `output`: lines, prefixes and progress bars of many processes on one terminal; pure.
- `pump`: the thread that reads the pipes of the processes.
- `signals`: signals as something to wait for.
- `job`: any list of real processes under those rules.
- `local`: scheduler, servers and workers on this machine.
- `child`, `guard`: two small scripts that see to it that nothing outlives the launcher.
"""
