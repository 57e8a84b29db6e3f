"""For those who test: the conformance suite, the specification as a dictionary, whole jobs in a process.

conformance.py   the checks every kind of store has to pass; suite.py, checks_*.py, bad_inputs.py
cluster.py       a whole job in this process, each worker a thread
reference.py     what a store must compute, in a hundred lines
"""
