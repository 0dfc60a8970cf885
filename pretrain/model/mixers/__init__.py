"""Sequence mixers, one a file: its config, its module. Files in this folder are found by `pretrain.model.sublayer.by_kind`."""
