"""A whole training step beside that of transformers: the same model with the same weights, the same optimizer and tokens.

Forward, loss, backward, clipping to norm 1, AdamW by torch's fused kernel in both; in turn, each in a process of its own, so that
whatever else the machine does meets both. Both models are made from one config.json; that they are the same is checked first, by
their losses. transformers computes as it does by default on the device at hand, its attention by torch's
scaled_dot_product_attention; models of theirs whose fast path is a package of GPU kernels run their own torch code on a CPU. Ours
runs as pretrain/main.py would, which on a CPU includes keeping freed memory (pretrain/host.py).
"""
