"""What an encoder is worth, beside the simplest guesses that know nothing."""
