"""What a person should know about a split before training on it, since its settings may not be what they meant."""

import numpy as np


def notes(dataset) -> list[str]:
    """Why the blocks are shorter than they could be. dataset: a data.BlockDataset."""
    cfg, found, limit = dataset.cfg, [], min(dataset.cfg.tokens_per_sample, dataset.cfg.max_tokens)
    if limit < cfg.tokens_per_sample and cfg.long_sentences == "split":
        found.append(
            f"--max_tokens {cfg.max_tokens} is below --tokens_per_sample {cfg.tokens_per_sample}: blocks are cut to"
            f" {limit} tokens"
        )
    median, separators = np.median(dataset.lengths), dataset.stream.sizes[:-1] == 1
    if cfg.sample_break_mode == "complete_doc" and 4 * median < limit and separators.any():
        found.append(
            f"half of the blocks have at most {median:.0f} of {limit} tokens, since no block crosses an empty line;"
            " where empty lines part paragraphs, --sample_break_mode complete joins them"
        )
    return found
