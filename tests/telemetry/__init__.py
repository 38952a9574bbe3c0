"""A package, so that the processes that its tests share end after the last of them, and not at the end of the run."""
