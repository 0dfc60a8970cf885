"""The small corpus of the training tests, here too."""

from tests.pretrain.conftest import corpus as corpus
