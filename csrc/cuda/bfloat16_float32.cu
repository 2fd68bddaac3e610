#include "cuda/backward.cuh"
#include "cuda/forward.cuh"

template class adapter_ext::cuda::Forward<__nv_bfloat16, adapter_ext::cuda::MultiplyAdd<float>>;
template class adapter_ext::cuda::Backward<__nv_bfloat16, adapter_ext::cuda::MultiplyAdd<float>>;
