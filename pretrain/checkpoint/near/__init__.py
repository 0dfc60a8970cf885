"""Peer-memory checkpoints: every rank's own state, also kept on its host and on another one, beside the shared checkpoints.

config.py     the section checkpoint.near
hosts.py      which ranks see the same near folder, and who keeps whose copy
parts.py      one rank's part as bytes: written, described, checked, filled in
exchange.py   parts sent between ranks, checked on arrival
store.py      what lies in this host's near folder
choice.py     which save may be resumed from
room.py       how much may be written
tier.py       when a save counts, and the way back: all ranks together

A save is one step of one job, cut as this job's ranks hold it; it counts when the part of every rank lies, whole, on some
host. There is no marker of that: at a restart the ranks list what their hosts have, and all parts of one save must be found.
So whatever dies, and whenever, what is left is judged by what is left.

A save passes these points (pretrain/checkpoint/points.py), each after "near: ": before own, half of own (the data is written, and
not its description), after own, before the buddy's, half of the buddy's, after the buddy's, complete, pruned.
"""
