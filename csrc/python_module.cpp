// adapter_ext._C: facts of the build, hooks for tests and benchmarks, and the check of snapshots.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/capability.h"
#include "snapshot.h"

namespace {

std::vector<std::string> names(const std::vector<adapter_ext::cpu::Capability>& capabilities) {
  std::vector<std::string> names;
  for (const auto capability : capabilities) {
    names.emplace_back(adapter_ext::cpu::name(capability));
  }
  return names;
}

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Facts of the build of adapter_ext, and what Python code needs for speed.";
  module.attr("version") = ADAPTER_EXT_VERSION;
  module.attr("torch_version") = ADAPTER_EXT_TORCH_VERSION;
  module.attr("compiler") = ADAPTER_EXT_COMPILER;
  module.attr("cuda_compiler") = ADAPTER_EXT_CUDA_COMPILER;
  module.attr("cuda_archs") = words(ADAPTER_EXT_CUDA_ARCHS);
  module.attr("build_type") = ADAPTER_EXT_BUILD_TYPE;
  module.def(
      "compiled_cpu_capabilities", [] { return names(adapter_ext::cpu::compiled_capabilities()); },
      "CPU levels that the library was compiled for, lowest first.");
  module.def(
      "supported_cpu_capabilities",
      [] { return names(adapter_ext::cpu::supported_capabilities()); },
      "Those of them that this machine can run.");
  module.def(
      "cpu_capability", [] { return adapter_ext::cpu::name(adapter_ext::cpu::capability()); },
      "The CPU level in use. Raises RuntimeError where ADAPTER_EXT_CPU_CAPABILITY names one that "
      "is not there.");
  module.def("fma_loop", &adapter_ext::cpu::fma_loop, pybind11::arg("iterations"),
             pybind11::call_guard<pybind11::gil_scoped_release>(),
             "Runs fp32 multiply-adds in registers alone on this thread, at the CPU level in use; "
             "returns the number of floating-point operations.");
  module.def("read_parameters", &adapter_ext::read_parameters, pybind11::arg("modules"),
             pybind11::arg("snapshots"), "See adapter_ext.snapshot.read_parameters.");
}
