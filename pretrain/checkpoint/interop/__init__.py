"""Hugging Face folders (config.json, safetensors, tokenizer): models out of our checkpoints and into them.

form.py       what a format is; which ones there are; what in a model stands in the way of one
plain.py      what a model computes, without names, repeats and defaults: in this form two configurations are compared
weights.py    which of their tensors hold ours, and in which arrangement: cut, joined, turned, never computed with
theirs.py     config.json, read so that nothing in it that matters goes unread
parts.py      what several formats share: attention, SwiGLU, experts, embedding and head
llama.py ...  one file a format
shards.py     safetensors files and their index
vocabulary.py our tokenizer as tokenizer.json
source.py     which checkpoint is meant by a path
export.py     a checkpoint -> a folder
intake.py     a folder -> a run folder with one checkpoint

Nothing here needs transformers; tests/oracles/test_interop.py holds every format against its classes.
"""

# Their model_type, in the order in which `--format auto` tries them.
FORMATS = ("llama", "qwen3_moe", "qwen3_next", "olmo_hybrid", "kimi_linear", "mamba2", "zaya")
