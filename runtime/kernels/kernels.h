// The operators of the library, a list for each file.
#pragma once

#include <vector>

#include "ort_abi.h"

namespace zreward {

std::vector<const ort::CustomOp*> attention_operators();
std::vector<const ort::CustomOp*> delta_net_operators();
std::vector<const ort::CustomOp*> quantized_linear_operators();
std::vector<const ort::CustomOp*> skip_norm_operators();

}  // namespace zreward
