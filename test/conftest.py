"""The fixtures that all test files here can ask for."""

from test.helpers import block_dataset, corpus_dir, saved, tokenizers  # noqa: F401
