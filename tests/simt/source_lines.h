#pragma once

#include <string>

namespace simt {

// The lines of the source that an address in the code comes from, the innermost first; the file and
// offset where there is no addr2line to ask.
std::string source_line(const void* place);

}  // namespace simt
