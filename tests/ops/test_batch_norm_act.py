from suite import OpSuite
from fastgen import testing
class TestBatchNormAct(OpSuite):
    op = "batch_norm_act"
    few = ("3x5x4x7-train-silu-residual", "3x6x5x3-eval-relu-residual")
    at_size = testing._batch_norm_act(3, 4, 131, 151, training=True, residual=True)
    second_derivatives = True
