"""Damaged and hostile inputs for every reader, drawn from a seed, and the judge of what they do.

`mutate` changes bytes, trees and pickles, `files` whole files, and `formats` knows the containers'
structure. `specimens` writes a whole input of each container, `containers` says how each is damaged
and read, `judge` reads one under watch. The driver is bench/fuzz.py; tests/test_fuzz.py runs a few
inputs of each container.
"""
