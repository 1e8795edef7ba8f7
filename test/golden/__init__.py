"""What fairseq did with a small corpus, and how it was recorded (docs/golden.md);
test/test_golden.py compares."""
