// Finds accesses to a block's shared memory that no barrier orders, reads of what nobody wrote,
// accesses of two blocks to the same global memory, and those of a launch that began early to what
// the launches before use.
//
// Kernels are compiled with -fsanitize=thread, which calls a function before each access to memory;
// race.cpp defines those functions in place of ThreadSanitizer's. Other builds track nothing.
#pragma once

#include <cstddef>

namespace simt::race {

#if defined(SIMT_RACE)

void begin_launch(bool early);
void begin_block(const void* shared, size_t bytes);
void end_block();

void block_barrier();
void warp_barrier(int warp, unsigned lanes);

// Accesses of the thread that runs. `place` is an address in the code.
void read(const void* address, size_t bytes, const void* place);
void write(const void* address, size_t bytes, const void* place);
void update(const void* address, size_t bytes, const void* place);

// Asynchronous copies to shared memory.
void copy_starts(const void* to, size_t bytes, const void* place);
void copy_ends(const void* to, size_t bytes, const void* place);

#else

inline void begin_launch(bool) {}
inline void begin_block(const void*, size_t) {}
inline void end_block() {}
inline void block_barrier() {}
inline void warp_barrier(int, unsigned) {}
inline void read(const void*, size_t, const void*) {}
inline void write(const void*, size_t, const void*) {}
inline void update(const void*, size_t, const void*) {}
inline void copy_starts(const void*, size_t, const void*) {}
inline void copy_ends(const void*, size_t, const void*) {}

#endif

}  // namespace simt::race
