"""`python -m autotune`: the same as the command `autotune`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the working directory, which may contain a user's random.py or queue.py
    from autotune.cli import main

    main()
