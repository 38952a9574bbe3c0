"""A package, so that the mesh goes down after its last test, and not at the end of the run."""
