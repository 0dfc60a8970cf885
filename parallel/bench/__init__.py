"""Collective microbenchmarks: `torchrun --nproc-per-node N -m parallel.bench --help`.

options.py   sizes.py                what the command line may say
groups.py    operations.py           among whom, and what: the shapes of groups, the collectives
pattern.py                           data with known answers
timing.py    device.py  summary.py   the clock, on hosts and on GPUs; how many iterations; their statistics
sweep.py     rows.py                 the measurement, and its result
overlap.py                           a collective beside a matrix product
table.py  files.py  plot.py  fits.py what is printed, written, drawn, and what follows for bucket sizes
session.py   interrupt.py            the run from start to end, Ctrl-C included
pairs.py                             every link between two ranks
"""
