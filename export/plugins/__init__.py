"""TensorRT plugins for three operators of the graphs, and their CUDA kernels (docs/tensorrt.md).

kernels/    CUDA, with a C interface of its own: tested and timed without TensorRT
tensorrt/   IPluginV3 and creators over the kernels
toolchain   finds nvcc, CMake and TensorRT's headers
build       makes `libzreward_plugins.so` and its record, which `zreward.plugins` opens
quick_head  the score head alone, as a Python plugin, for people without a C++ compiler
"""
