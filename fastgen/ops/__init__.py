"""The fused operations. Each file holds an equation, a public function, its PyTorch reference and its registration."""

from fastgen.ops.activations import ACTIVATIONS
from fastgen.ops.attention import attention, attention_reference
from fastgen.ops.batch_norm_act import batch_norm_act, batch_norm_act_reference
from fastgen.ops.bias_act import bias_act, bias_act_reference
from fastgen.ops.conv2d import conv2d, conv2d_reference, norm_act_conv2d, norm_act_conv2d_reference
from fastgen.ops.conv2d_norm_act import (
    conv2d_norm_act,
    conv2d_norm_act_reference,
    conv_transpose2d_norm_act,
    conv_transpose2d_norm_act_reference,
)
from fastgen.ops.diffusion_step import diffusion_step, diffusion_step_reference
from fastgen.ops.group_norm_act import group_norm_act, group_norm_act_reference
from fastgen.ops.modulated_conv2d import modulated_conv2d, modulated_conv2d_reference
from fastgen.ops.philox import (
    Stream,
    philox_bits,
    philox_bits_reference,
    philox_normal,
    philox_normal_reference,
)
from fastgen.ops.q_sample import q_sample, q_sample_reference
from fastgen.ops.reparameterize import reparameterize, reparameterize_reference
from fastgen.ops.to_uint8 import to_uint8, to_uint8_reference
from fastgen.ops.upfirdn2d import (
    downsample2d,
    filter2d,
    setup_filter,
    upfirdn2d,
    upfirdn2d_reference,
    upsample2d,
)

__all__ = [
    "ACTIVATIONS",
    "Stream",
    "attention",
    "attention_reference",
    "batch_norm_act",
    "batch_norm_act_reference",
    "bias_act",
    "bias_act_reference",
    "conv2d",
    "conv2d_norm_act",
    "conv2d_norm_act_reference",
    "conv2d_reference",
    "conv_transpose2d_norm_act",
    "conv_transpose2d_norm_act_reference",
    "diffusion_step",
    "diffusion_step_reference",
    "downsample2d",
    "filter2d",
    "group_norm_act",
    "group_norm_act_reference",
    "modulated_conv2d",
    "modulated_conv2d_reference",
    "norm_act_conv2d",
    "norm_act_conv2d_reference",
    "philox_bits",
    "philox_bits_reference",
    "philox_normal",
    "philox_normal_reference",
    "q_sample",
    "q_sample_reference",
    "reparameterize",
    "reparameterize_reference",
    "setup_filter",
    "to_uint8",
    "to_uint8_reference",
    "upfirdn2d",
    "upfirdn2d_reference",
    "upsample2d",
]
