"""Parts of `python -m kernels.check`: compiling Triton kernels for devices that are not there, and judging the result.

choice.py    decides from outside which form of an operator serves a call
trace.py     calls a public Triton form on CPU tensors; every launch becomes a compilation for the chosen architecture
figures.py   reads registers, spills, shared memory, matrix instructions out of what the compiler produced
verdict.py   says which figures are faults
requests.py  the representative calls of every operator
sweep.py     one architecture and operator: all requests, all rows of the tuning table
faults.py    small kernels with a planted fault each, to show that the checker catches it
"""
