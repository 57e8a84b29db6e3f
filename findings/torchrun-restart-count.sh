#!/usr/bin/env bash
# torch==2.13.0: after a restart the workers of one job are told different values of TORCHELASTIC_RESTART_COUNT,
# each agent counting only the failures of its own workers; and the TCPStore that the agent shares with them
# (TORCHELASTIC_USE_AGENT_STORE=True) still holds every key that the attempt before has set.
#
# Seen in the second attempt of two agents with a worker each, of which rank 0 has failed once:
#     restart count 0, keys of the first attempt found: yes
#     restart count 1, keys of the first attempt found: yes
#
# Why it matters: whoever puts the restart count into names, or meets under fixed names in that store, so as to tell the
# attempts of a job apart, has workers that wait for each other under different names, or that find addresses of
# processes which have ended. An attempt needs a name that one worker makes up and tells the others.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0

cat > "$folder/train.py" <<'PYTHON'
import os
import signal
import sys
from pathlib import Path

from torch.distributed import TCPStore

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
if (folder / "failed").exists():
    count, found = os.environ["TORCHELASTIC_RESTART_COUNT"], store.check(["worker 0", "worker 1"])
    told = f"restart count {count}, keys of the first attempt found: {'yes' if found else 'no'}\n"
    (folder / f"seen{rank}").write_text(told)
    sys.exit()
store.set(f"worker {rank}", "first attempt")
if rank == "1":
    signal.pause()  # busy, until its agent ends it
store.wait(["worker 1"])
(folder / "failed").touch()
sys.exit(1)
PYTHON
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
for _ in 0 1; do
    "$folder/venv/bin/torchrun" --nnodes 2 --nproc-per-node 1 --max-restarts 1 --rdzv-backend c10d --rdzv-id job \
        --rdzv-endpoint "127.0.0.1:$port" --local-addr 127.0.0.1 "$folder/train.py" "$folder" 2> /dev/null &
done
wait
sort "$folder"/seen* | tee "$folder/all"
diff "$folder/all" <(printf 'restart count %d, keys of the first attempt found: yes\n' 0 1)
