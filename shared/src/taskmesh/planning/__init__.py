"""The scaling model: what a mesh needs for a given load, and what KEDA and the HPA make of it.

Standard library and Pydantic alone, imported by no service: `taskmesh plan` is its only caller. docs/scaling.md has the
sums in words.
"""
