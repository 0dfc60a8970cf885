"""Does the optimizer do what its name says? `python -m pretrain.optim.probe --config X`, under any layout."""
