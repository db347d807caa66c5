"""The CUDA kernels of `zreward.export.plugins` against references, and their times: run.sh runs all of it on a GPU."""
