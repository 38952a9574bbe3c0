"""Metrics: what is counted and timed (`catalogue`), how it is recorded (`instruments`) and exported (`provider`).

There is one provider in each tree of processes. A worker's pool children have none: they send what they measure to the
worker's main process (`pool`).
"""
