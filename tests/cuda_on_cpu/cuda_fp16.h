#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Half.h>

struct __half {
  torch::headeronly::Half value;
};
inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return {torch::headeronly::Half(x)}; }
