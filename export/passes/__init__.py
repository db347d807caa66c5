"""Graph passes, one a file: each takes a model, changes it in place and returns how often it did.

A pass that finds nothing where it must find something raises `ExportError`, because the graph is then
not the one it was written for.
"""
