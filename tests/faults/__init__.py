"""Faults put in the way of conversions and builds, and the judge of what is left of them.

`server` is a process that has porttool imported and forks for every command, so that one costs a
fraction of a second; in the fork a trap counts what is done to files and springs at a given count.
`stage` speaks to it; `works` says what is run and what whole output looks like; `cases` are the
faults. The driver is bench/faults.py; tests/test_faults.py runs a few of each kind.
"""
