"""What fairseq did with a small corpus, and how it was recorded (docs/golden.md); tests/test_golden.py compares."""
