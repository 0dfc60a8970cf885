"""Does a model train the same on every layout of ranks? `torchrun --nproc-per-node N -m pretrain.equivalence --config X`."""
