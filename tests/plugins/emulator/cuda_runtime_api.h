// For what is built on emulated kernels: checks of calls, plugins and TensorRT's headers, which name these types.
#pragma once
#include "emulator.h"

using cudaEvent_t = void*;
