// Activations of a buffer, by name, and its exponential; the equations: csrc/common/activations.h.
#pragma once

#include <cstdint>

namespace fastgen {

// z becomes act(z), or act'(z). z: [n], in L1 if it is to be fast
void activate(int code, float* z, int64_t n);
void activate(int code, double* z, int64_t n);
void activate_grad(int code, float* z, int64_t n);
void activate_grad(int code, double* z, int64_t n);
// z becomes exp(z).
void exponential(float* z, int64_t n);
void exponential(double* z, int64_t n);

}  // namespace fastgen
