"""Is this node fit to train on? `python -m launch.preflight` asks before a job does.

    check.py       what a check is, and its four answers: pass, warn, fail, not checked
    node.py        where checks get their facts: files below a root, commands with a time limit, variables, probes
    catalogue.py   all checks in the order of the table, and choosing among them by name
    probes/        what runs in a process of its own, because it touches a device or a filesystem that may hang
    peers.py       what only several ranks together can find out: `--peers` under torchrun

A check that lacks its tool or its device answers "not checked" and says why. It never passes for want of evidence.
"""
