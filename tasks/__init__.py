"""Labelled text on a pretrained encoder."""
