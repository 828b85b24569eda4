"""One fresh worker process a trial: phases, timing, memory."""
