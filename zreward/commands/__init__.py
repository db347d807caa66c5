"""The handlers of the command line, one module a group; `zreward.cli` puts them together.

A handler parses nothing and computes nothing: it calls one function of the package and prints what came
back. It imports that function when it is called, so that `zreward --help` does not load numpy, torch or
ONNX, and so that a command needs only the extras of its own work.
"""
