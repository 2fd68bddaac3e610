// The entry points of runtime.cpp once more, for kernels that the PTX simulator runs.
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <string>

extern "C" int ptxsim_error_count();
extern "C" const char* ptxsim_last_error();
extern "C" void ptxsim_clear_errors();

#define SIMT_API extern "C" __attribute__((visibility("default")))

namespace {

int multiprocessors = 0;  // 0: as many as the simulator has by itself
int shared_bytes = 0;

void set(const char* name, const std::string& value) { setenv(name, value.c_str(), 1); }

}  // namespace

SIMT_API void simt_configure(uint64_t seed, int block_order, int processors, int bytes) {
  constexpr const char* kOrders[] = {"ascending", "reverse", "random"};
  multiprocessors = processors;
  shared_bytes = bytes;
  set("PTXSIM_STRICT", "1");  // library.cpp says which memory a call may touch
  set("PTXSIM_RACE", "1");
  set("PTXSIM_SEED", std::to_string(seed));
  set("PTXSIM_BLOCK_ORDER", kOrders[block_order]);
}
SIMT_API uint64_t simt_error_count() { return static_cast<uint64_t>(ptxsim_error_count()); }
SIMT_API const char* simt_last_error() { return ptxsim_last_error(); }
SIMT_API void simt_clear() { ptxsim_clear_errors(); }

// Launchers ask this one, and not the simulator's. The attributes are those of cudaDeviceAttr.
extern "C" int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  constexpr int kMultiprocessors = 16, kSharedBytesOfBlock = 97;
  static const auto simulators = reinterpret_cast<decltype(&cudaDeviceGetAttribute)>(
      dlsym(RTLD_NEXT, "cudaDeviceGetAttribute"));
  const int error = simulators(value, attribute, device);
  if (attribute == kMultiprocessors && multiprocessors) *value = multiprocessors;
  if (attribute == kSharedBytesOfBlock && shared_bytes) *value = shared_bytes;
  return error;
}
