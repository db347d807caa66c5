"""Targets: what each runtime wants of the graphs, as a list of passes. One target a file."""
