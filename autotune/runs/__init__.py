"""What a run directory is: its files, its records, its objective, its verdict."""
