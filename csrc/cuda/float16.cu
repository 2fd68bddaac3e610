#include "cuda/backward.cuh"
#include "cuda/forward.cuh"

template class adapter_ext::cuda::Forward<__half, adapter_ext::cuda::TensorCore<__half>>;
template class adapter_ext::cuda::Backward<__half, adapter_ext::cuda::TensorCore<__half>>;
