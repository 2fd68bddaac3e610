#include "cuda/backward.cuh"
#include "cuda/forward.cuh"

template class adapter_ext::cuda::Forward<float, adapter_ext::cuda::MultiplyAdd<float>>;
template class adapter_ext::cuda::Backward<float, adapter_ext::cuda::MultiplyAdd<float>>;
