# The target stable_torch: LibTorch's stable ABI, of torch 2.10 or later.
#
# Only headers under torch/csrc/stable, torch/headeronly and the C shim are used, so a library that
# was built against one torch runs in every later one. It is linked to libtorch_cpu.so by name:
# torch loads its libraries locally, where symbols of ours would otherwise stay undefined. No path
# of the build's torch is kept, since an isolated build environment is gone after the build.

add_library(stable_torch INTERFACE)
target_include_directories(stable_torch SYSTEM INTERFACE ${ADAPTER_EXT_TORCH_DIR}/include)
target_compile_definitions(stable_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(stable_torch INTERFACE ${ADAPTER_EXT_TORCH_DIR}/lib/libtorch_cpu.so)
# libtorch_cpu.so's own dependencies are found when torch is imported, not when we link.
target_link_options(stable_torch INTERFACE -Wl,--no-undefined -Wl,--allow-shlib-undefined)
