"""Predicts a training job before anybody pays for it: `python -m launch.plan`.

What is counted (bytes, FLOPs, messages) comes from pretrain/estimate/, how fast messages are from parallel/fabric/, what is
allowed from the code that the run itself asks. Here are seconds:

    source.py      a run file, or a model file with defaults, a hardware file and a number of GPUs -> a question
    chip.py        seconds of a matrix product and of bytes on one device, measured or from the datasheet
    step_time.py   seconds of a step, and where they go
    forecast.py    one layout: memory, time, speed; what would make it fit (room.py); what limits it
    failures.py    failures a day and the best interval between checkpoints
    search.py      the best layouts (legal.py: which there are), and why the others lose (reasons.py)
    sweep.py       strong and weak scaling
    sizing.py      the model's sizes by the published rules
    show.py, numbers.py, plot.py   as text, JSON, pictures
"""
