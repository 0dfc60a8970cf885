"""Proof that a run that was killed and resumed equals one that was never interrupted, bit for bit.

worker.py   one rank of one of the three runs: uninterrupted, interrupted (killed), resumed
ranks.py    starts the ranks of a run, and ends them
compare.py  what of two runs differs: tensors, what stands beside them in a checkpoint, metrics
proof.py    the three runs one after the other, and the comparisons
"""
