"""Campaigns: conditions × seeds from one TOML file, squeezed by themselves.

spec: TOML → runs; manifest: what has become of them; launch: runs → executors, and the squeeze after
the first that finishes; results: records → means and gains.
"""
