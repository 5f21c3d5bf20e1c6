"""Engines of many machines behind one address.

The only package that imports ray.
"""
