"""What tools/verify_import.py computes for each kind of fixture: `CHECKS` of the modules here.

A check takes a fixture and gives its outputs by name, computed by the code of eve/ alone.
"""
