// Loaded before kernels that the PTX simulator runs: the blocks of a launch run in turns, as on a
// GPU that holds them all, and share the cache. By itself the simulator does so for cooperative
// launches alone.
#include <dlfcn.h>

#include <cstddef>

namespace {

struct Dim3 {
  unsigned x, y, z;
};

unsigned most_blocks = 0;  // larger launches run block after block

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void in_turns_most_blocks(unsigned blocks) {
  most_blocks = blocks;
}

int cudaLaunchCooperativeKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments,
                                size_t shared, void* stream);

__attribute__((visibility("default"))) int cudaLaunchKernel(const void* kernel, Dim3 grid,
                                                            Dim3 block, void** arguments,
                                                            size_t shared, void* stream) {
  static const auto one_by_one =
      reinterpret_cast<decltype(&cudaLaunchKernel)>(dlsym(RTLD_NEXT, "cudaLaunchKernel"));
  const auto launch = grid.x <= most_blocks ? &cudaLaunchCooperativeKernel : one_by_one;
  return launch(kernel, grid, block, arguments, shared, stream);
}

}  // extern "C"
