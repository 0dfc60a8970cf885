"""Feed-forward sublayers, one a file: its config, its module. Files are found by `pretrain.model.sublayer.by_kind`."""
