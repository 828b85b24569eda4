"""One candidate in, one TrialResult out, from a fresh worker process."""
