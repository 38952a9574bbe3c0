"""A worker whose tasks are cheap, misbehave on demand, and leave one row for each effect: doubles can be counted."""
