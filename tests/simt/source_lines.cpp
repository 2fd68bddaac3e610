#include "source_lines.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>

namespace simt {

std::string source_line(const void* place) {
  Dl_info info{};
  if (!dladdr(place, &info) || !info.dli_fname) return "an unknown place";
  // A return address is behind the call.
  uintptr_t address = reinterpret_cast<uintptr_t>(place) - 1;
  address -= reinterpret_cast<uintptr_t>(info.dli_fbase);
  char offset[32];
  snprintf(offset, sizeof(offset), "0x%zx", static_cast<size_t>(address));
  std::string text;
  const std::string command =
      std::string("addr2line -s -i -e '") + info.dli_fname + "' " + offset + " 2>/dev/null";
  if (FILE* lines = popen(command.c_str(), "r")) {
    char line[1024];
    while (fgets(line, sizeof(line), lines)) {
      std::string name = line;
      name.erase(name.find_last_not_of("\n") + 1);
      name.erase(name.find(" (discriminator") == std::string::npos ? name.size()
                                                                   : name.find(" (discriminator"));
      if (name.find("simt.h") != std::string::npos) continue;  // a wrapper of what kernels call
      text += (text.empty() ? "" : " from ") + name;
    }
    pclose(lines);
  }
  if (text.empty() || text.find('?') == 0) return std::string(info.dli_fname) + "+" + offset;
  return text;
}

}  // namespace simt
