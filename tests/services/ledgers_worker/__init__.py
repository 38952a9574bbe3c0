"""A worker service of which some tasks are idempotent and some are not, for the tests of `taskmesh verify`."""
