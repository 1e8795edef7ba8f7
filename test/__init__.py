"""One file for each concern, at most 400 lines each; `bash run_1p.sh test` runs them. test_core.py
is at the top."""
