// Philox4x32-10, the counter-based random number generator of Salmon et al., "Parallel Random
// Numbers: As Easy as 1, 2, 3" (2011), and what the ops draw from it.
//
// Masks are a function of (seed, row, column) alone, so the backward recomputes them, and they
// depend neither on the number of threads nor on the tiling.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace adapter_ext {

enum PhiloxStream : uint32_t { kDropoutStream = 0, kDepthStream = 1 };

struct PhiloxKey {
  uint32_t low;
  uint32_t high;

  ADAPTER_EXT_HOST_DEVICE void advance() {  // to that of the next round
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
};

ADAPTER_EXT_HOST_DEVICE PhiloxKey philox_key(int64_t seed) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
}

// One of the ten rounds.
ADAPTER_EXT_HOST_DEVICE void philox_round(uint32_t (&c)[4], PhiloxKey key) {
  const uint64_t product0 = static_cast<uint64_t>(c[0]) * 0xD2511F53u;
  const uint64_t product1 = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
  const uint32_t c0 = static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key.low;
  const uint32_t c2 = static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key.high;
  c[1] = static_cast<uint32_t>(product1);
  c[3] = static_cast<uint32_t>(product0);
  c[0] = c0;
  c[2] = c2;
}

// Replaces the counter by four words, each uniform in [0, 2^32).
ADAPTER_EXT_HOST_DEVICE void philox(uint32_t (&c)[4], PhiloxKey key) {
#if defined(__CUDA_ARCH__)
#pragma unroll 1  // a kernel that draws at many places would be several times as long
#endif
  for (int round = 0; round < 10; ++round) {
    philox_round(c, key);
    key.advance();
  }
}

// A word below the threshold means "dropped". The threshold is up to 2^32, hence 64 bits.
ADAPTER_EXT_HOST_DEVICE uint64_t drop_threshold(double probability) {
  // Round half to even, as Python's round() does.
  const double scaled = probability * 4294967296.0;
  const uint64_t floor = static_cast<uint64_t>(scaled);
  const double fraction = scaled - static_cast<double>(floor);
  return floor + ((fraction > 0.5 || (fraction == 0.5 && (floor & 1))) ? 1 : 0);
}

// A chance to be dropped: by a random word below the threshold.
struct Chance {
  uint64_t threshold;
  double kept_scale;  // of what is kept: 1 / keep probability

  ADAPTER_EXT_HOST_DEVICE Chance(double probability = 0.0)
      : threshold(drop_threshold(probability)),
        kept_scale(probability < 1.0 ? 1.0 / (1.0 - probability) : 0.0) {}
  // The seed may be null where there is nothing to draw.
  ADAPTER_EXT_HOST_DEVICE PhiloxKey key(const int64_t* seed) const {
    return threshold > 0 ? philox_key(*seed) : PhiloxKey{};
  }
};

// Whether stochastic depth keeps a unit: an adapter, or a sample.
ADAPTER_EXT_HOST_DEVICE bool depth_keeps(int64_t unit, PhiloxKey key, uint64_t threshold) {
  uint32_t counter[4] = {static_cast<uint32_t>(unit),
                         static_cast<uint32_t>(static_cast<uint64_t>(unit) >> 32), 0, kDepthStream};
  philox(counter, key);
  return counter[0] >= threshold;
}

}  // namespace adapter_ext
