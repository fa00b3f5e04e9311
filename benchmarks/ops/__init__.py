"""One file per op, named by the op's stem: what a call must move and compute, and who else to compare with.

A file defines ``work(inputs, outputs) -> (forward, backward)``, the least bytes and floating-point
operations of a call (exp, log and sqrt count one), and may define

- ``prepare(inputs) -> inputs``, to make a case's inputs realistic;
- ``columns(inputs) -> {name: function}``, other implementations, called with the same arguments.

Cases, the plain PyTorch version and the reference come from `fastgen.testing` and `fastgen.ops`.
"""
