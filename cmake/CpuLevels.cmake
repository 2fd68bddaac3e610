# Compiles kernel sources once for each instruction set, into namespaces of their own; the library
# picks one when it is loaded (csrc/cpu/capability.cpp).

# Sources behind BFLOAT16 are also compiled for the levels that multiply in bfloat16: AVX-512 with
# dot products of pairs, and AMX with those of tiles.
function(adapter_ext_add_cpu_levels target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "BFLOAT16")
  # The baseline comes first: should two levels share an inline function of the standard library,
  # the linker keeps the copy that runs everywhere.
  set(levels baseline)
  set(flags_baseline "")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    list(APPEND levels avx2 avx512 avx512_bf16 amx_bf16)
    set(flags_avx2 -mavx2 -mfma -mf16c)
    set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq
      -mprefer-vector-width=512)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # GCC's own AVX-512 headers trip this warning (GCC bug 105593).
      list(APPEND flags_avx512 -Wno-maybe-uninitialized -Wno-uninitialized)
    endif()
    set(flags_avx512_bf16 ${flags_avx512} -mavx512bf16)
    set(flags_amx_bf16 ${flags_avx512_bf16} -mamx-tile -mamx-bf16)
    target_compile_definitions(${target} PRIVATE ADAPTER_EXT_X86_LEVELS)
  endif()
  foreach(level IN LISTS levels)
    set(sources ${arg_UNPARSED_ARGUMENTS} ${arg_BFLOAT16})
    if(level MATCHES "_bf16$")
      set(sources ${arg_BFLOAT16})
    endif()
    add_library(${target}_${level} OBJECT ${sources})
    target_include_directories(${target}_${level} PRIVATE ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../csrc)
    target_compile_options(${target}_${level} PRIVATE -O3 ${flags_${level}})
    target_compile_definitions(${target}_${level} PRIVATE ADAPTER_EXT_CPU_LEVEL=${level})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${level}>)
  endforeach()
endfunction()
