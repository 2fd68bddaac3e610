# Language level, warnings and visibility for all targets.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_INSTALL_RPATH "$ORIGIN")

# Errors only where CMAKE_COMPILE_WARNING_AS_ERROR says so, as CI does: a user's newer compiler may
# know warnings that ours does not.
add_compile_options(-Wall -Wextra)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # Vectors wider than the baseline never cross a function that is not inlined.
  add_compile_options(-Wno-psabi)
endif()
