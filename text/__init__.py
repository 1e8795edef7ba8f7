"""Text on disk, both ways: raw text to the binarized dataset, and back to tokens, blocks and masks. No torch."""
