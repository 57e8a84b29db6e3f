"""Runs the floor; see tensorkv.bench.floor.

python benchmarks/floor.py --set resnet50 --way shm --workers 2 --servers 2
"""

from __future__ import annotations

from tensorkv.bench.floor import main

if __name__ == "__main__":
    main()
