# The library adapter_ext_cuda: the ops' CUDA kernels. Included where ADAPTER_EXT_NVCC names nvcc.
#
# nvcc is called directly: CMake's own CUDA language asks for a toolkit in one piece, which nvcc from
# a wheel is not. Torch's CUDA build is not needed, nor is a GPU.

foreach(variable ADAPTER_EXT_CUDA_ROOT ADAPTER_EXT_CUDA_ARCHS)
  if(NOT ${variable})
    message(FATAL_ERROR "${variable} is not set: build with `pip install .`")
  endif()
endforeach()

# Machine code for each architecture, and PTX of the newest for those to come.
# The runtime's headers may lie elsewhere than nvcc, which then has others of its own: see setup.py.
set(cuda_flags -std=c++20 -O3 -I${CMAKE_SOURCE_DIR}/csrc -I${ADAPTER_EXT_CUDA_ROOT}/include
  -Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-Wall,-Wextra)
set(cuda_newest 0)
foreach(arch IN LISTS ADAPTER_EXT_CUDA_ARCHS)
  list(APPEND cuda_flags -gencode=arch=compute_${arch},code=sm_${arch})
  if(arch GREATER cuda_newest)
    set(cuda_newest ${arch})
  endif()
endforeach()
list(APPEND cuda_flags -gencode=arch=compute_${cuda_newest},code=compute_${cuda_newest})
if(CMAKE_COMPILE_WARNING_AS_ERROR)
  list(APPEND cuda_flags -Werror=all-warnings -Xcompiler=-Werror)
endif()

file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu)
set(cuda_objects "")
foreach(source IN LISTS cuda_sources)
  cmake_path(GET source STEM name)
  set(object ${CMAKE_BINARY_DIR}/cuda/${name}.o)
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${ADAPTER_EXT_NVCC} ${cuda_flags} -MD -MF ${object}.d -c ${source} -o ${object}
    DEPENDS ${source}
    DEPFILE ${object}.d
    COMMENT "Compiling csrc/cuda/${name}.cu"
    VERBATIM)
  list(APPEND cuda_objects ${object})
endforeach()
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/cuda)

# Linked by name, as libtorch_cpu.so is; a CPU build of torch has no such file, so a stand-in with the
# functions that we call takes its place, and stays here.
file(WRITE ${CMAKE_BINARY_DIR}/cuda/torch_cuda.cpp
  "extern \"C\" __attribute__((visibility(\"default\")))\n"
  "int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n")
add_library(torch_cuda_name SHARED ${CMAKE_BINARY_DIR}/cuda/torch_cuda.cpp)
set_target_properties(torch_cuda_name PROPERTIES OUTPUT_NAME torch_cuda)

find_library(cudart_static cudart_static REQUIRED NO_CACHE NO_DEFAULT_PATH
  PATHS ${ADAPTER_EXT_CUDA_ROOT}
  PATH_SUFFIXES targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib lib64 lib)
find_package(Threads REQUIRED)

add_library(adapter_ext_cuda SHARED csrc/library_cuda.cpp ${cuda_objects})
target_include_directories(adapter_ext_cuda PRIVATE csrc)
target_link_options(adapter_ext_cuda PRIVATE -Wl,--no-as-needed -Wl,--exclude-libs,ALL)
target_link_libraries(adapter_ext_cuda PRIVATE stable_torch torch_cuda_name ${cudart_static}
  Threads::Threads ${CMAKE_DL_LIBS} rt)
set_target_properties(adapter_ext_cuda PROPERTIES BUILD_WITH_INSTALL_RPATH ON)
install(TARGETS adapter_ext_cuda LIBRARY DESTINATION .)
