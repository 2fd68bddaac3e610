#include "runtime.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "fiber.h"
#include "race.h"
#include "source_lines.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Copy {
  void* to;
  const void* from;
  int count;
};

enum class State { kReady, kWaitsForLanes, kWaitsForBlock, kReturned };

struct Thread {
  Fiber fiber;
  State state;
  int index;

  // What it waits in.
  const char* name;
  const void* place;  // an address in the code
  unsigned mask;
  bool whole_warp;
  void* operands;
  Execute execute;
  bool value;
  std::source_location where;

  bool early;  // has not waited for the launches before

  std::vector<Copy> copies;    // asynchronous ones, not carried out
  std::vector<size_t> groups;  // how many of them are in each group, the oldest first

  int lane() const { return index % kWarp; }
  int warp() const { return index / kWarp; }
};

struct Warp {
  unsigned live;     // lanes that have not returned
  unsigned waiting;  // of those, the ones that wait for lanes
};

// Orders of lanes, warps and blocks.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {  // splitmix64
    state_ += 0x9e3779b97f4a7c15u;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next() % i]);
  }

 private:
  uint64_t state_;
};

enum BlockOrder { kAscending, kReverse, kRandom };

struct Settings {
  uint64_t seed = 0;
  int block_order = kAscending;
  Limits limits{4, 99 * 1024};
  bool records = false;  // launches are written down instead of run
};

struct Failure {
  std::string text;
  const void* place = nullptr;  // an address in the code
  const void* other_place = nullptr;
};

// State of the launch that runs; launches run one at a time.
std::mutex launch_mutex;
Settings settings;
uint64_t launch_count = 0, error_count = 0;
std::string last_error;
std::string recorded;  // see simt_recorded()

const Launch* launch = nullptr;
Thread threads[Stacks::kMost];
Warp warps[Stacks::kMost / kWarp];
Thread* current = nullptr;  // null where the scheduler runs
Failure* failure = nullptr;
unsigned char* shared = nullptr;

std::string text_of(const dim3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) +
         ")";
}
std::string text_of(const uint3& at) { return text_of(dim3(at.x, at.y, at.z)); }

void record(const Thread* thread, const char* kind, const std::string& what, const void* place,
            const void* other_place = nullptr) {
  if (failure) return;
  std::string text =
      std::string(kind) + ": kernel " + launch->name + ", block " + text_of(blockIdx);
  if (thread) text += ", thread " + std::to_string(thread->index);
  failure = new Failure{text + ": " + what, place, other_place};
}

// Carries out what lanes wait for if all of its lanes are there.
bool finish_waiting(Warp& warp, int warp_index, unsigned mask, Execute execute) {
  const unsigned members = mask & warp.live;
  if ((warp.waiting & members) != members) return false;
  void* operands[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(members >> lane & 1)) continue;
    const Thread& thread = threads[warp_index * kWarp + lane];
    if (thread.mask != mask || thread.execute != execute) return false;
    operands[lane] = thread.operands;
  }
  if (execute) {
    execute(operands);
  } else {
    race::warp_barrier(warp_index, members);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (members >> lane & 1) threads[warp_index * kWarp + lane].state = State::kReady;
  }
  warp.waiting &= ~members;
  return true;
}

// Lanes may have waited for the others only.
void thread_returned() {
  Thread& self = *current;
  self.state = State::kReturned;
  if (self.early) record(&self, "early return", "has not waited for the kernels before", nullptr);
  Warp& warp = warps[self.warp()];
  warp.live &= ~(1u << self.lane());
  for (int lane = 0; lane < kWarp; ++lane) {
    const Thread& other = threads[self.warp() * kWarp + lane];
    if (!(warp.waiting >> lane & 1)) continue;
    if (other.whole_warp) {
      record(&other, "incomplete warp",
             std::string("waits in ") + other.name + ", but thread " + std::to_string(self.index) +
                 " has returned",
             other.place);
    } else {
      finish_waiting(warp, self.warp(), other.mask, other.execute);
    }
  }
}

void run_thread() {
  fiber_started();
  launch->call(launch->kernel, launch->params);
  thread_returned();
  current->fiber.end();
}

void enter(Thread& thread) {
  current = &thread;
  const unsigned index = static_cast<unsigned>(thread.index);
  threadIdx = {index, 0, 0};
  thread.fiber.enter();
  current = nullptr;
}

// Runs the threads of a warp until all of them wait or have returned.
void run_warp(int warp_index, Random& random) {
  Warp& warp = warps[warp_index];
  bool progress = true;
  while (progress && !failure) {
    progress = false;
    // Multiples of an odd number visit all lanes.
    const uint64_t number = settings.seed ? random.next() : 0;
    const int first = static_cast<int>(number % kWarp);
    const int step = static_cast<int>(number >> 32) % kWarp | 1;
    for (int i = 0; i < kWarp && !failure; ++i) {
      const int lane = (first + i * step) & (kWarp - 1);
      Thread& thread = threads[warp_index * kWarp + lane];
      if (!(warp.live >> lane & 1) || thread.state != State::kReady) continue;
      progress = true;
      enter(thread);
    }
  }
}

// Lets all threads go on that wait for the block. Where that cannot be, says why.
void release_block(int warp_count) {
  const Thread* first = nullptr;
  bool value = false;
  for (int w = 0; w < warp_count; ++w) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(warps[w].live >> lane & 1)) continue;
      const Thread& thread = threads[w * kWarp + lane];
      if (thread.state == State::kWaitsForLanes) {
        char mask[16];
        snprintf(mask, sizeof(mask), "%08x", thread.mask);
        std::string others;
        const void* other_place = nullptr;
        for (int other = 0; other < kWarp && !other_place; ++other) {
          const Thread& missing = threads[w * kWarp + other];
          if (!((thread.mask & warps[w].live) >> other & 1)) continue;
          if (missing.state == State::kWaitsForLanes && missing.mask == thread.mask &&
              missing.execute == thread.execute) {
            continue;
          }
          others =
              ", of which thread " + std::to_string(missing.index) + " waits in " + missing.name;
          other_place = missing.place;
        }
        return record(&thread, "deadlock",
                      std::string("waits in ") + thread.name + " for lanes " + mask + others,
                      thread.place, other_place);
      }
      if (!first) first = &thread;
      value = value || thread.value;
      if (thread.name != first->name || thread.where.line() != first->where.line() ||
          strcmp(thread.where.file_name(), first->where.file_name()) != 0) {
        return record(&thread, "divergent barrier",
                      std::string("waits in ") + thread.name + ", thread " +
                          std::to_string(first->index) + " in another " + first->name,
                      thread.place, first->place);
      }
    }
  }
  for (int w = 0; w < warp_count; ++w) {
    const int existing = std::min(launch->threads - w * kWarp, kWarp);
    const unsigned all = existing == kWarp ? kAllLanes : (1u << existing) - 1;
    if (warps[w].live != 0 && warps[w].live != all) {
      const int missing = __builtin_ctz(all & ~warps[w].live);
      return record(first, "divergent barrier",
                    std::string("waits in ") + first->name + ", but thread " +
                        std::to_string(w * kWarp + missing) +
                        " has returned, and others of its warp have not",
                    first->place);
    }
  }
  race::block_barrier();
  for (int i = 0; i < launch->threads; ++i) {
    if (threads[i].state != State::kWaitsForBlock) continue;
    threads[i].state = State::kReady;
    threads[i].value = value;
  }
}

void run_block(Random& random) {
  const int warp_count = (launch->threads + kWarp - 1) / kWarp;
  std::vector<int> order(static_cast<size_t>(warp_count));
  std::iota(order.begin(), order.end(), 0);
  for (int i = 0; i < launch->threads; ++i) {
    Thread& thread = threads[i];
    thread.index = i;
    thread.state = State::kReady;
    thread.early = launch->early;
    thread.copies.clear();
    thread.groups.clear();
    thread.fiber.prepare(static_cast<size_t>(i), &run_thread);
  }
  for (int w = 0; w < warp_count; ++w) {
    const int existing = std::min(launch->threads - w * kWarp, kWarp);
    warps[w] = {existing == kWarp ? kAllLanes : (1u << existing) - 1, 0};
  }
  while (true) {
    if (settings.seed) random.shuffle(order);
    for (const int w : order) {
      run_warp(w, random);
      if (failure) return;
    }
    const bool done =
        std::all_of(warps, warps + warp_count, [](const Warp& warp) { return warp.live == 0; });
    if (done) return;
    release_block(warp_count);
    if (failure) return;
  }
}

// Shared memory of the size asked for. AddressSanitizer sees accesses beyond its end; other builds
// look afterwards whether bytes there have changed.
class SharedMemory {
 public:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 256;
#endif
  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes + kGuard) != 0) throw std::bad_alloc();
    memory_.reset(static_cast<unsigned char*>(memory));
  }
  unsigned char* get() const { return memory_.get(); }
  // NaN, so that a use of what nobody wrote shows.
  void fill() { memset(get(), 0xff, bytes_ + kGuard); }
  bool overrun() const {
    return std::any_of(get() + bytes_, get() + bytes_ + kGuard,
                       [](unsigned char byte) { return byte != 0xff; });
  }

 private:
  struct Free {
    void operator()(unsigned char* memory) const { free(memory); }
  };
  size_t bytes_;
  std::unique_ptr<unsigned char, Free> memory_;
};

void run_blocks() {
  Random random(settings.seed + 0x100000000u * launch_count);
  const dim3 grid = launch->grid;
  const uint64_t count = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> order;
  if (settings.block_order == kRandom) {
    order.resize(count);
    std::iota(order.begin(), order.end(), uint64_t{0});
    random.shuffle(order);
  }
  SharedMemory memory(static_cast<size_t>(launch->shared_bytes));
  shared = memory.get();
  race::begin_launch(launch->early);
  for (uint64_t i = 0; i < count && !failure; ++i) {
    const uint64_t block = settings.block_order == kRandom    ? order[i]
                           : settings.block_order == kReverse ? count - 1 - i
                                                              : i;
    blockIdx = {static_cast<unsigned>(block % grid.x),
                static_cast<unsigned>(block / grid.x % grid.y),
                static_cast<unsigned>(block / grid.x / grid.y)};
    memory.fill();
    race::begin_block(shared, static_cast<size_t>(launch->shared_bytes));
    run_block(random);
    race::end_block();
    if (memory.overrun()) {
      record(nullptr, "out of bounds", "wrote beyond the end of shared memory", nullptr);
    }
  }
  shared = nullptr;
}

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer's reports do not say which thread of a kernel it was.
void tell_thread() {
  if (!current) return;
  fprintf(stderr, "simt: in kernel %s, block %s, thread %d\n", launch->name,
          text_of(blockIdx).c_str(), current->index);
}
#endif

void check_launch() {
  const dim3 grid = launch->grid;
  const auto text = [](int number) { return std::to_string(number); };
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    record(nullptr, "invalid launch", "a grid of " + text_of(grid), nullptr);
  } else if (launch->threads < 1 || launch->threads > static_cast<int>(Stacks::kMost)) {
    record(nullptr, "invalid launch", text(launch->threads) + " threads", nullptr);
  } else if (launch->shared_bytes < 0 || launch->shared_bytes > settings.limits.shared_bytes) {
    record(nullptr, "invalid launch",
           text(launch->shared_bytes) + " bytes of shared memory, there are " +
               text(settings.limits.shared_bytes),
           nullptr);
  }
}

[[noreturn]] void fail_at(const char* kind, const std::string& what, const void* place,
                          const void* other_place) {
  if (!current) {
    fprintf(stderr, "simt: outside of a kernel: %s: %s\n", kind, what.c_str());
    abort();
  }
  record(current, kind, what, place, other_place);
  while (true) current->fiber.leave();  // never comes back
}

bool in_shared(const void* address, size_t bytes) {
  const auto offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(shared);
  const size_t size = static_cast<size_t>(launch->shared_bytes);
  return offset <= size && bytes <= size - offset;
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

void wait_for_lanes_at(const char* name, unsigned mask, bool whole_warp, void* operands,
                       Execute execute, const void* place) {
  Thread& self = *current;
  Warp& warp = warps[self.warp()];
  if (!(mask >> self.lane() & 1)) {
    fail_at("lane outside of its mask", std::string("calls ") + name, place, nullptr);
  }
  if (whole_warp && warp.live != kAllLanes) {
    fail_at("incomplete warp", std::string(name) + " needs all 32 lanes", place, nullptr);
  }
  self.name = name;
  self.place = place;
  self.mask = mask;
  self.whole_warp = whole_warp;
  self.operands = operands;
  self.execute = execute;
  self.state = State::kWaitsForLanes;
  warp.waiting |= 1u << self.lane();
  if (!finish_waiting(warp, self.warp(), mask, execute)) self.fiber.leave();
}

float value_of(OperandType type, uint32_t bits, int half) {
  if (type == OperandType::kTf32) return std::bit_cast<float>(bits & ~0x1fffu);
  const uint16_t own = static_cast<uint16_t>(bits >> (16 * half));
  if (type == OperandType::kFloat16) return half_value(own);
  return std::bit_cast<float>(static_cast<uint32_t>(own) << 16);
}

struct ProductOperands {
  float* sum;
  const uint32_t *a, *b;
};

// The fragments' layouts are those of the PTX manual for mma.m16n8k16 and mma.m16n8k8. Products are
// exact, and their sum is rounded once.
template <OperandType type>
void multiply_fragments(void* const* operands) {
  constexpr bool is_16_bit = type != OperandType::kTf32;
  constexpr int depth = is_16_bit ? 16 : 8, per_register = is_16_bit ? 2 : 1;
  double a[16][depth], b[depth][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& own = *static_cast<const ProductOperands*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < per_register; ++half) {
        const int k = t * per_register + half + i / 2 * (depth / 2);
        a[g + i % 2 * 8][k] = value_of(type, own.a[i], half);
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < per_register; ++half) {
        b[t * per_register + half + i * (depth / 2)][g] = value_of(type, own.b[i], half);
      }
    }
  }
  double sum[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& own = *static_cast<const ProductOperands*>(operands[lane]);
    for (int i = 0; i < 4; ++i) sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = own.sum[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& own = *static_cast<const ProductOperands*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      own.sum[i] = static_cast<float>(sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
    }
  }
}

struct MatrixOperands {
  uint32_t* to;
  const unsigned char* row;
};

template <bool transposed>
void load_rows(void* const* operands) {
  const auto of = [&](int lane) { return *static_cast<const MatrixOperands*>(operands[lane]); };
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int along = lane % 4 * 2 + i, across = lane / 4;
        const int row = transposed ? along : across, column = transposed ? across : along;
        memcpy(&pair[i], of(matrix * 8 + row).row + 2 * column, 2);
      }
      memcpy(&of(lane).to[matrix], pair, 4);
    }
  }
}

void record_launch() {
  const void* kernel = *static_cast<const void* const*>(launch->kernel);
  Dl_info info{};
  if (!dladdr(kernel, &info)) return record(nullptr, "record", "an unknown kernel", nullptr);
  const ptrdiff_t offset =
      static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase);
  recorded += std::to_string(offset) + " " + std::to_string(launch->threads) + " " +
              std::to_string(launch->shared_bytes) + "\n";
}

}  // namespace

void run(const Launch& started) {
  const std::lock_guard lock(launch_mutex);
  launch = &started;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(&tell_thread);
#endif
  ++launch_count;
  blockIdx = {};
  blockDim = dim3(static_cast<unsigned>(started.threads));
  gridDim = started.grid;
  check_launch();
  if (!failure) settings.records ? record_launch() : run_blocks();
  launch = nullptr;
  if (!failure) return;
  std::string text = "simt: " + failure->text;
  if (failure->place) text += "; at " + source_line(failure->place);
  if (failure->other_place) text += "; the other at " + source_line(failure->other_place);
  delete failure;
  failure = nullptr;
  ++error_count;
  last_error = text;
  throw std::runtime_error(text);
}

Limits limits() { return settings.limits; }
unsigned char* shared_memory() { return shared; }
int lane() { return current->lane(); }
int thread_index() { return current ? current->index : -1; }

void fail(const char* kind, const std::string& what, const void* place, const void* other_place) {
  fail_at(kind, what, place ? place : __builtin_return_address(0), other_place);
}

void fail_assertion(const char* expression, const char* file, int line) {
  fail_at("assertion",
          std::string(file) + ":" + std::to_string(line) + ": " + expression + " is false",
          __builtin_return_address(0), nullptr);
}

bool wait_for_block(const char* name, bool value, const std::source_location& where) {
  Thread& self = *current;
  self.name = name;
  self.place = __builtin_return_address(0);
  self.value = value;
  self.where = where;
  self.state = State::kWaitsForBlock;
  self.fiber.leave();
  return self.value;
}

void wait_for_lanes(const char* name, unsigned mask, bool whole_warp, void* operands,
                    Execute execute) {
  wait_for_lanes_at(name, mask, whole_warp, operands, execute, __builtin_return_address(0));
}

void wait_for_warp(unsigned mask) {
  wait_for_lanes_at("__syncwarp", mask, false, nullptr, nullptr, __builtin_return_address(0));
}

void wait_for_previous() { current->early = false; }
bool waits_for_previous() { return current && current->early; }

void load_matrices(bool transposed, uint32_t (&to)[4], const void* from) {
  const void* place = __builtin_return_address(0);
  if (!aligned(from)) fail_at("misaligned address", "load_matrices", place, nullptr);
  if (!in_shared(from, 16)) fail_at("out of bounds", "load_matrices", place, nullptr);
  race::read(from, 16, place);
  MatrixOperands operands{to, static_cast<const unsigned char*>(from)};
  wait_for_lanes_at(transposed ? "load_matrices<true>" : "load_matrices<false>", kAllLanes, true,
                    &operands, transposed ? &load_rows<true> : &load_rows<false>, place);
}

void multiply_add(OperandType type, float (&sum)[4], const uint32_t* a, const uint32_t* b) {
  constexpr Execute executes[] = {&multiply_fragments<OperandType::kBFloat16>,
                                  &multiply_fragments<OperandType::kFloat16>,
                                  &multiply_fragments<OperandType::kTf32>};
  ProductOperands operands{sum, a, b};
  wait_for_lanes_at("multiply_add", kAllLanes, true, &operands, executes[static_cast<int>(type)],
                    __builtin_return_address(0));
}

void copy_async(void* to, const void* from, int count) {
  const void* place = __builtin_return_address(0);
  if (!aligned(to) || !aligned(from)) {
    fail_at("misaligned address", "copy_async", place, nullptr);
  }
  if (count < 0 || count > 16) {
    fail_at("invalid argument", "copy_async of " + std::to_string(count) + " bytes", place,
            nullptr);
  }
  if (!in_shared(to, 16)) fail_at("out of bounds", "copy_async", place, nullptr);
  race::copy_starts(to, 16, place);
  current->copies.push_back({to, from, count});
}

void copy_async_commit() {
  Thread& self = *current;
  const size_t grouped = std::accumulate(self.groups.begin(), self.groups.end(), size_t{0});
  self.groups.push_back(self.copies.size() - grouped);
}

void copy_async_wait(int groups) {
  Thread& self = *current;
  const void* place = __builtin_return_address(0);
  while (self.groups.size() > static_cast<size_t>(groups)) {
    const auto first = self.copies.begin();
    const auto last = first + static_cast<std::ptrdiff_t>(self.groups.front());
    for (auto copy = first; copy != last; ++copy) {
      race::read(copy->from, static_cast<size_t>(copy->count), place);
      race::copy_ends(copy->to, 16, place);
      memcpy(copy->to, copy->from, static_cast<size_t>(copy->count));
      memset(static_cast<char*>(copy->to) + copy->count, 0, static_cast<size_t>(16 - copy->count));
    }
    self.copies.erase(first, last);
    self.groups.erase(self.groups.begin());
  }
}

void report_atomic(const void* address, int bytes) {
  race::update(address, static_cast<size_t>(bytes), __builtin_return_address(0));
}

}  // namespace simt

// For the programs that test kernels.
#define SIMT_API extern "C" __attribute__((visibility("default")))

// `seed` 0 keeps lanes and warps in order; `block_order` is one of BlockOrder.
SIMT_API void simt_configure(uint64_t seed, int block_order, int multiprocessors,
                             int shared_bytes) {
  simt::settings = {seed, block_order, {multiprocessors, shared_bytes}};
}
// From here to the next simt_configure() launches are written down, and not run.
SIMT_API void simt_record() { simt::settings.records = true; }
// A line for each of them since simt_clear(): where the kernel lies in the library, in bytes; the
// threads of a block; its shared memory in bytes.
SIMT_API const char* simt_recorded() { return simt::recorded.c_str(); }
SIMT_API uint64_t simt_error_count() { return simt::error_count; }
SIMT_API uint64_t simt_launch_count() { return simt::launch_count; }
SIMT_API const char* simt_last_error() { return simt::last_error.c_str(); }
SIMT_API void simt_clear() {
  simt::error_count = simt::launch_count = 0;
  simt::last_error.clear();
  simt::recorded.clear();
}
