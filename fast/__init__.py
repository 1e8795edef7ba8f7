"""The same numbers sooner. Code here may change the speed and never a number: each function names the plain form that
it equals and the test that compares the two."""
