"""Memory profile of one step: every byte of the peak, by category."""
