"""Attention, against the equation written out (eager) and PyTorch's scaled_dot_product_attention."""

import torch.nn.functional as F

from benchmarks.harness import Work, nbytes


def work(inputs, outputs):
    q, k, v = (inputs[name] for name in "qkv")
    flops = 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3] // (2 if inputs["causal"] else 1)
    read = nbytes(q, k, v)
    # Backward: five products, one of them the scores again, where forward has two.
    return Work(read + nbytes(outputs[0]), flops), Work(2 * read + 2 * nbytes(outputs[0]), flops * 5 // 2)


def columns(inputs):
    def sdpa(q, k, v, causal):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return {"SDPA": sdpa}
