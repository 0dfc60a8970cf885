"""Parts of `python -m kernels.bench`.

shapes.py       what a workload is
workloads.py    what is timed: operators under their published names, their inputs and shapes
dense.py        of these, attention, experts and the loss's head
contenders.py   who is timed: our forms, and the peers that are installed
timing.py       interleaved timing on CPU and GPU
memory.py       peak memory of a call
measure.py      one workload and shape: all contenders, forward and backward
correctness.py  every form against the reference, forward and gradients
tune.py         searches launch parameters on the device at hand and writes the tuning tables
report.py       tables and JSON
hardware/       what the chip does at best: memory bandwidth and matrix products
"""
