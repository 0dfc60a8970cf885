"""The watcher of a training process: a small parent process of each rank, which no fault of training can hold up.

It forks the training process before anything heavy is imported, and from then on

* returns that process's true exit code, dies by the signal that it died by, and takes it along when it is ended itself;
* turns SIGTERM and SIGUSR1 into exit code 75, whatever the training process is doing (watcher.py);
* watches its heartbeat (pulse.py) against limits learned from the run (limits.py), and when one is passed has all ranks write
  down where they are (report.py, process.py), says who is at fault (blame.py), ends them, and answers 76;
* leaves an account of how it ended for torchrun (outcome.py).

Nothing here may import torch, or anything else outside the standard library, but config.py, which the training process reads.
"""
