"""Text on disk, both ways: raw text to the dataset, and back to tokens, blocks and masks.

No torch, and nothing of the higher floors; only the program text.reviews stands higher.
"""
