"""`python -m autotune`: the same as the command `autotune`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the working folder, where a user's random.py or queue.py may lie
    from autotune.cli import main

    main()
