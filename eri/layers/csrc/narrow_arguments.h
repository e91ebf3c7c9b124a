// A narrow product that a kernel makes of the rows that it writes; see eri/layers/narrow.py.
#pragma once

#include <cstdint>

namespace eri {

constexpr int64_t kNarrowRanks = 48;  // at most

struct NarrowArguments {
  const void* down;     // [ranks, width of the rows]; null: there is no such product
  void* hidden;         // [rows, ranks]; it is written behind the rows, too
  int64_t down_stride;  // elements from one rank to the next, a multiple of 16 bytes
  int64_t ranks;        // a multiple of 8
  float scale;          // of the product
};

}  // namespace eri
