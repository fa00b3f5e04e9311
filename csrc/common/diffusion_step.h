// The equations of one sampler step, for host and device; see fastgen/ops/diffusion_step.py. Each operation is rounded
// once, everywhere: a step of one image has the same bits on every backend.
#pragma once

#include "philox.h"  // FASTGEN_HD, add_product

namespace fastgen {

template <typename W>
struct StepCoefficients {
  W p[4], q[5];  // one row of the table
};

template <typename W>
struct StepResult {
  W next, x0, eps;
};

template <typename W>
FASTGEN_HD StepResult<W> diffusion_step(const StepCoefficients<W>& c, W x, W m, W history, W noise, W clip) {
  const W raw = add_product(mul_rn(c.p[0], x), c.p[1], m);
  const W low = raw < -clip ? -clip : raw;  // comparisons that let NaN through, as torch.clamp does
  const W x0 = low > clip ? clip : low;
  const W eps = add_product(mul_rn(c.p[2], x), c.p[3], m);
  const W network = add_product(add_product(mul_rn(c.q[0], x), c.q[1], x0), c.q[2], eps);
  return {add_product(add_product(network, c.q[3], history), c.q[4], noise), x0, eps};
}

}  // namespace fastgen
