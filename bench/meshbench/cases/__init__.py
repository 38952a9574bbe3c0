"""The cases, each a function that takes the stage and returns what it has measured."""
