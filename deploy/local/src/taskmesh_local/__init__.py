"""The whole mesh on one machine, with real parts. See the README of deploy/local."""
