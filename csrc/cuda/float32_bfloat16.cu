#include "cuda/backward.cuh"
#include "cuda/forward.cuh"

template class adapter_ext::cuda::Forward<float, adapter_ext::cuda::TensorCore<__nv_bfloat16>>;
template class adapter_ext::cuda::Backward<float, adapter_ext::cuda::TensorCore<__nv_bfloat16>>;
