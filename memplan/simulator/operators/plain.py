"""Operators that were looked at and need no rule: their outputs are all they allocate.

An operator that a trace meets and that is neither here nor under a rule was never
looked at; a test fails on it. Sources are files of aten/src/ATen/native.
"""

from __future__ import annotations

from itertools import chain

HOST = (
    "aten::_local_scalar_dense",
    "aten::std.correction",
    "profiler::_record_function_enter_new",
    "profiler::_record_function_exit._RecordFunction",
)
"""Nothing on the card: a copy to the host (cuda/CUDAScalar.cu), RandLoRA's bases, which
PEFT scales on the host (tuners.randlora.model), a profiler's marks."""

VIEWS = (
    "aten::_conj",
    "aten::_unsafe_view",
    "aten::alias",
    "aten::as_strided",
    "aten::detach",
    "aten::expand",
    "aten::lift_fresh",
    "aten::permute",
    "aten::select.int",
    "aten::set_.source_Tensor",
    "aten::slice.Tensor",
    "aten::split.Tensor",
    "aten::split_with_sizes",
    "aten::squeeze.dim",
    "aten::t",
    "aten::transpose.int",
    "aten::unbind.int",
    "aten::unsqueeze",
    "aten::view",
    "aten::view_as_complex",
    "aten::view_as_real",
)
"""Nothing: another description of their input's storage (TensorShape.cpp)."""

IN_PLACE = (
    "aten::__ior__.Tensor",
    "aten::add_.Tensor",
    "aten::addcdiv_",
    "aten::addcmul_",
    "aten::bitwise_or_.Tensor",
    "aten::clamp_",
    "aten::copy_",
    "aten::div_.Tensor",
    "aten::fill_.Scalar",
    "aten::lerp_.Scalar",
    "aten::logical_and_",
    "aten::masked_fill_.Scalar",
    "aten::mul_.Tensor",
    "aten::rsqrt_",
    "aten::scatter_.src",
    "aten::scatter_.value",
    "aten::sub_.Tensor",
    "aten::uniform_",
    "aten::zero_",
)
"""Nothing: one pass over their input (cuda/Loops.cuh; cuda/Copy.cu, whose copies within
a card cast as they go; cuda/ScatterGatherKernel.cu; cuda/DistributionUniform.cu)."""

IN_PLACE_LISTS = (
    "aten::_foreach_add_.List",
    "aten::_foreach_add_.Scalar",
    "aten::_foreach_add_.Tensor",
    "aten::_foreach_addcdiv_.ScalarList",
    "aten::_foreach_addcmul_.Scalar",
    "aten::_foreach_div_.ScalarList",
    "aten::_foreach_lerp_.Scalar",
    "aten::_foreach_mul_.Scalar",
    "aten::_foreach_mul_.Tensor",
)
"""Nothing: addresses travel as kernel arguments (cuda/MultiTensorApply.cuh)."""

LISTS = ("aten::_foreach_sqrt",)
"""One output a tensor, all before the first kernel (cuda/ForeachUnaryOp.cu)."""

ELEMENTWISE = (
    "aten::__lshift__.Scalar",
    "aten::__rshift__.Scalar",
    "aten::_to_copy",
    "aten::abs",
    "aten::add.Tensor",
    "aten::bitwise_and.Scalar",
    "aten::bitwise_and.Tensor",
    "aten::bitwise_not",
    "aten::bitwise_or.Tensor",
    "aten::clamp",
    "aten::clamp_min",
    "aten::clone",
    "aten::cos",
    "aten::div.Scalar",
    "aten::div.Tensor",
    "aten::eq.Scalar",
    "aten::eq.Tensor",
    "aten::exp",
    "aten::floor",
    "aten::floor_divide",
    "aten::ge.Scalar",
    "aten::ge.Tensor",
    "aten::gelu",
    "aten::gelu_backward",
    "aten::gt.Tensor",
    "aten::le.Scalar",
    "aten::le.Tensor",
    "aten::log",
    "aten::log1p",
    "aten::masked_fill.Scalar",
    "aten::mul.Scalar",
    "aten::mul.Tensor",
    "aten::native_dropout_backward",
    "aten::ne.Scalar",
    "aten::neg",
    "aten::polar",
    "aten::pow.Scalar",
    "aten::pow.Tensor_Scalar",
    "aten::pow.Tensor_Tensor",
    "aten::reciprocal",
    "aten::relu",
    "aten::rsqrt",
    "aten::rsub.Scalar",
    "aten::sigmoid",
    "aten::sigmoid_backward",
    "aten::silu",
    "aten::silu_backward",
    "aten::sin",
    "aten::softplus",
    "aten::softplus_backward",
    "aten::sqrt",
    "aten::sub.Tensor",
    "aten::tanh",
    "aten::tanh_backward",
    "aten::threshold_backward",
    "aten::where.self",
)
"""The output: TensorIterator reads inputs of any layout in place, and numbers of the
host travel as kernel arguments (TensorIterator.cpp; cuda/Loops.cuh)."""

FILLED = (
    "aten::arange",
    "aten::arange.start",
    "aten::arange.start_step",
    "aten::empty.memory_format",
    "aten::empty_like",
    "aten::eye",
    "aten::eye.m_out",
    "aten::full",
    "aten::full_like",
    "aten::linspace",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::new_ones",
    "aten::new_full",
    "aten::new_zeros",
    "aten::ones",
    "aten::ones_like",
    "aten::randn",
    "aten::scalar_tensor",
    "aten::triu_indices",
    "aten::zeros",
    "aten::zeros_like",
)
"""The output, which is then filled (TensorFactories.cpp; cuda/RangeFactories.cu)."""

REARRANGED = (
    "aten::_convert_weight_to_int4pack",
    "aten::cat",
    "aten::constant_pad_nd",
    "aten::flip",
    "aten::gather",
    "aten::index_select",
    "aten::repeat",
    "aten::reshape",
    "aten::scatter.src",
    "aten::scatter_add",
    "aten::select_backward",
    "aten::slice_backward",
    "aten::stack",
    "aten::to.dtype",
    "aten::tril",
    "aten::triu",
)
"""The output: inputs are read in place (cuda/Shape.cu, PadNd.cpp, TensorTransformations
.cpp, cuda/TriangularOps.cu, cuda/int4mm.cu); scatters copy their input into it first;
what need not be copied or cast is the input itself (TensorShape.cpp,
TensorConversions.cpp)."""

LOOKED_UP = (
    "aten::embedding",
    "aten::histc",
    "aten::kthvalue",
    "aten::nll_loss_backward",
    "aten::nll_loss_forward",
    "aten::topk",
)
"""The outputs: rows are gathered (cuda/Indexing.cu), bins counted in shared or global
memory (cuda/SummaryOps.cu), losses summed by one block (cuda/NLLLoss2d.cu and Loss.cu);
the first of a row's scores are found and sorted in place up to 4096 of them
(cuda/TensorTopK.cpp), and experts and drawn tokens are fewer; the k-th is selected
digit by digit in shared memory (cuda/Sorting.cu)."""

POOLED = ("aten::avg_pool2d", "aten::avg_pool2d_backward")
"""The output: inputs and gradients that are dense are read in place
(cuda/AveragePool2d.cu)."""

ATTENTION = ("aten::_scaled_dot_product_cudnn_attention",)
"""The outputs, two of which are the seeds (transformers/cuda/attention.cu); the forward
graph of cuDNN needs no workspace of the front end (cudnn-frontend,
scaled_dot_product_flash_attention.h)."""

QUANTIZED = (
    "bitsandbytes::dequantize_4bit",
    "bitsandbytes::dequantize_blockwise",
    "quanto::unpack",
)
"""The output (bitsandbytes, backends/cuda/ops.py; optimum-quanto,
library/extensions/cuda/unpack.cu)."""

PLAIN = frozenset(
    chain(
        HOST,
        VIEWS,
        IN_PLACE,
        IN_PLACE_LISTS,
        LISTS,
        ELEMENTWISE,
        FILLED,
        REARRANGED,
        LOOKED_UP,
        POOLED,
        ATTENTION,
        QUANTIZED,
    )
)
"""All of them, by name and overload."""
