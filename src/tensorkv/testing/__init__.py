"""Test support: the conformance suite, an executable specification, whole jobs in one process.

conformance.py   the checks every kind of store must pass; suite.py, checks_*.py, bad_inputs.py
cluster.py       a whole job in this process, each worker a thread
reference.py     what a store must compute, in a hundred lines
"""
