"""The only code that asks which chip it is."""
