"""Measuring a trained model: perplexity and bits per byte, recall (MQAR, needle in a haystack), lm-evaluation-harness.

`python -m pretrain.evaluate --checkpoint runs/quickstart --tasks perplexity,mqar` is the command.
"""
