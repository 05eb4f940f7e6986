"""Where a job runs: connecting to Ray or starting it, and checking that what was asked for exists."""
