#include "cuda/backward.cuh"
#include "cuda/forward.cuh"

template class adapter_ext::cuda::Forward<double, adapter_ext::cuda::MultiplyAdd<double>>;
template class adapter_ext::cuda::Backward<double, adapter_ext::cuda::MultiplyAdd<double>>;
