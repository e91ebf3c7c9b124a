// The narrow product of rows that a block makes: H of what it writes; see eri/layers/narrow.py.
//
// Eight rows are the columns of mma.m16n8k16's B, and 16 ranks the rows of its A. Lane l of a warp
// is (l / 4, l % 4) = (g, t). A sum's numbers may come in any order, so a lane gives one vector of
// 16 bytes of row g, and of ranks g and g + 8, for what would be its places of two products.
#pragma once

#include "lora_tiles.h"
#include "narrow_arguments.h"
#include "vectors.h"

namespace eri {
namespace {

constexpr int kTokens = 8;      // rows of a product
constexpr int kTileRanks = 16;  // ranks of one

template <typename Scalar>
struct Narrow {
  const uint4* down;  // [ranks, numbers of a row]
  int64_t stride;     // vectors from one rank to the next
  uint32_t* hidden;   // H [rows, ranks], two numbers in a word
  int ranks;          // a multiple of 8
  float scale;
};

template <typename Scalar>
Narrow<Scalar> narrow_of(const NarrowArguments& a) {
  return {static_cast<const uint4*>(a.down), a.down_stride / Vector<Scalar>::kSize,
          static_cast<uint32_t*>(a.hidden), static_cast<int>(a.ranks), a.scale};
}

// sums += ranks of a tile times a vector of the lane's row, which lies at this column.
template <typename Scalar>
__device__ __forceinline__ void add_vector(float (&sums)[4], const Narrow<Scalar>& narrow, int tile,
                                           int column, const Vector<Scalar>& row) {
  // ranks that are not there repeat the last one and are written nowhere
  const int rank = tile * kTileRanks + static_cast<int>(threadIdx.x) % 32 / 4;
  const uint4 low = __ldg(narrow.down + min(rank, narrow.ranks - 1) * narrow.stride + column);
  const uint4 high = __ldg(narrow.down + min(rank + 8, narrow.ranks - 1) * narrow.stride + column);
  const uint32_t first[4] = {low.x, high.x, low.y, high.y};
  const uint32_t second[4] = {low.z, high.z, low.w, high.w};
  multiply<Scalar>(sums, first, row.words[0], row.words[1]);
  multiply<Scalar>(sums, second, row.words[2], row.words[3]);
}

// What the warps of a block have added up, a tile of ranks after the other: kParts of them share
// the columns of the same eight rows, and kRows such eights are the block's.
template <int kTiles, int kParts, int kRows>
struct Sums {
  static constexpr int kRow = kTileRanks + 4;  // of a token, so that lanes meet different banks
  static constexpr int kThreads = 32 * kParts * kRows;
  float of[kParts][kTiles][kRows * kTokens][kRow];

  __device__ __forceinline__ void put(int part, int rows, int tile, const float (&sums)[4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32, rank = lane / 4;
    const int token = rows * kTokens + lane % 4 * 2;
    auto& mine = of[part][tile];
    mine[token][rank] = sums[0];
    mine[token + 1][rank] = sums[1];
    mine[token][rank + 8] = sums[2];
    mine[token + 1][rank + 8] = sums[3];
  }

  // Adds the parts up in their order, and writes H twice: compact, and behind the rows it is of.
  template <typename Scalar>
  __device__ __forceinline__ void write(const Narrow<Scalar>& narrow, int64_t first_row,
                                        int64_t rows, Rows<uint4> result, int columns) const {
    const int words = narrow.ranks / 2;
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kTokens * words; i += kThreads) {
      const int token = i / words, word = i % words;
      const int64_t row = first_row + token;
      if (row >= rows) return;
      float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float* from = &of[part][2 * word / kTileRanks][token][2 * word % kTileRanks];
        sum.x += from[0];
        sum.y += from[1];
      }
      sum.x *= narrow.scale;
      sum.y *= narrow.scale;
      const uint32_t packed = pack_pair(sum, Scalar());
      narrow.hidden[row * words + word] = packed;
      reinterpret_cast<uint32_t*>(result.first + row * result.stride + columns)[word] = packed;
    }
  }
};

}  // namespace
}  // namespace eri
