"""What every service's tests need: real servers, sinks for what the mesh sends out, and payloads.

`taskmesh.testing.plugin` is a pytest plugin that is there as soon as the library is installed with the extra `testing`.
"""
