"""Parts of `python -m kernels.bench hardware`: what the chip at hand does at best.

command.py     the command line
machine.py     who this is, how large its caches and its memory are
clock.py       times one call: device events on a GPU, wall clock on a CPU
bandwidth.py   copy, mul, add, triad and dot over arrays of growing size
dtypes.py      the dtypes of matrix products, and which of them this device has
matmul.py      matrix products over sizes, dtypes and layouts
plateau.py     ceilings, and the work from which they are reached
report.py      tables and JSON
plot.py        heat maps and curves
section.py     puts the ceilings into a hardware file
progress.py    one line that says how far it is
"""
