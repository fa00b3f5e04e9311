// The namespace `fastgen_cpp`: raw C++ kernels. The public ops, with autograd, live in fastgen/ops and call
// these. Each csrc/cpu/<op>.cpp adds its own:
//
//   STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cpp, m) { m.def("op_fwd(Tensor x, Tensor(a!) out) -> ()"); }
//   STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) { m.impl("op_fwd", TORCH_BOX(&op_fwd)); }
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"

namespace {

std::string isa() { return fastgen::isa_name(fastgen::isa()); }

}  // namespace

STABLE_TORCH_LIBRARY(fastgen_cpp, m) { m.def("isa() -> str"); }

// No tensor tells which kernel to take, so it is the same one for every device.
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
