"""Ask for a candidate, measure it, tell the study; then the verdict."""
