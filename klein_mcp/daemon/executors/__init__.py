"""Executors compute jobs: one file each."""
