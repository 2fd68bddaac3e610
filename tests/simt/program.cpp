// Runs one of the kernels in broken/ as a program, which sanitizers may end. Arguments: its name
// and a seed. Prints the results or the error.

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

extern "C" void simt_configure(uint64_t seed, int block_order, int multiprocessors,
                               int shared_bytes);
extern "C" const char* simt_last_error();

int main(int, char** arguments) {
  simt_configure(std::strtoull(arguments[2], nullptr, 10), 0, 4, 99 * 1024);
  std::vector<float> in(64), out(64);
  for (int i = 0; i < 64; ++i) in[static_cast<size_t>(i)] = static_cast<float>(i);
  using Run = bool (*)(const float*, float*);
  const auto run =
      reinterpret_cast<Run>(dlsym(nullptr, (std::string("run_") + arguments[1]).c_str()));
  if (!run(in.data(), out.data())) {
    std::printf("%s\n", simt_last_error());
    return 1;
  }
  for (const float value : out) std::printf("%.9g\n", value);
}
