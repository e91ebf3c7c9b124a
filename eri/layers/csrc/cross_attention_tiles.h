// What the kernels of cross_attention share: tiles in shared memory, and the products of tiles.
//
// A warp takes 16 queries, or twice that, and meets all keys of a chunk at once, so a row of scores
// is within four lanes. In shared memory a row is in pieces of 16 bytes, and rows are an odd number
// of pieces apart, so that one piece of eight rows is in different banks.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cross_attention.h"
#include "launch.h"
#include "tensor_cores.h"

namespace eri {
namespace {

constexpr unsigned int kWarp = ~0u;
constexpr int kDevices = 64;  // whose occupancy is remembered
constexpr int kChunks = 6;    // of keys, at most
constexpr int kSharedBytes = 99 * 1024;  // what every card gives a block
constexpr float kLog2E = 1.4426950408889634f;

struct Problem {
  int queries;        // of a sample
  int keys;           //
  int heads;          //
  int tiles;          // of a sample's queries
  int strips;         // that they are shared out to
  int held;           // chunks of keys in shared memory: all of them, or one at a time
  int width;          // numbers of a row of q: heads * size
  int kv_stride;      // and of kv, what lies between rows included
  int result_stride;  // likewise of o or dq
  float scale;        // 1 / sqrt(size)
  float power_scale;  // the same for powers of two
};

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & 31; }

// A value that stays in its register; what it comes from is not worked out again at each use.
__device__ __forceinline__ uint32_t kept(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Rows of kColumns numbers of 16 bits, filled up with zeros to a multiple of 16.
template <int kColumns>
struct Tile {
  static constexpr int kPieces = (kColumns + 15) / 16 * 2;
  static constexpr int kPitch = kPieces | 1;

  static constexpr __host__ __device__ int bytes(int rows) { return rows * kPitch * 16; }
  static constexpr __host__ __device__ uint32_t at(int row, int piece) {
    return static_cast<uint32_t>(row * kPitch + piece) * 16;
  }
  // Where a lane finds its row of four matrices: the second one is below the first ...
  static __device__ __forceinline__ uint32_t below(uint32_t tile) {
    return kept(tile + at(lane_id() & 15, lane_id() >> 4));
  }
  // ... or beside it.
  static __device__ __forceinline__ uint32_t beside(uint32_t tile) {
    return kept(tile + at((lane_id() & 7) + ((lane_id() >> 4) << 3), (lane_id() >> 3) & 1));
  }
};

// Asks for kRows rows, `present` of which are there; the others become zeros.
template <int kColumns, int kRows, int kThreads, typename Scalar>
__device__ __forceinline__ void copy_rows(uint32_t tile, const Scalar* from, int stride,
                                          int present, int thread) {
  using Rows = Tile<kColumns>;
#pragma unroll
  for (int first = 0; first < kRows * Rows::kPieces; first += kThreads) {
    const int i = first + thread;
    if (kRows * Rows::kPieces % kThreads != 0 && i >= kRows * Rows::kPieces) break;
    const int row = i / Rows::kPieces;
    const int piece = i % Rows::kPieces;
    const bool there = row < present && (Rows::kPieces * 8 == kColumns || 8 * piece < kColumns);
    copy_async(tile + Rows::at(row, piece), from + row * stride + 8 * piece, !there);
  }
}

// c = rows, whose matrices are below each other, times the rows of another tile, transposed.
template <typename Scalar, int kColumns, int kRowTiles, int kTiles>
__device__ __forceinline__ void multiply_rows(float (&c)[kRowTiles][kTiles][4], uint32_t below,
                                              uint32_t beside) {
  using Rows = Tile<kColumns>;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[r][n][i] = 0.0f;
    }
  }
#pragma unroll
  for (int piece = 0; piece < Rows::kPieces; piece += 2) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) load_matrices(a[r], below + Rows::at(16 * r, piece));
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      load_matrices(b, beside + Rows::at(8 * n, piece));
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        multiply_add<Scalar>(c[r][n], a[r], b[0], b[1]);
        multiply_add<Scalar>(c[r][n + 1], a[r], b[2], b[3]);
      }
    }
  }
}

// c += packed rows times a tile, whose matrices are below each other.
template <typename Scalar, int kColumns, int kRowTiles, int kTiles>
__device__ __forceinline__ void multiply_packed(float (&c)[kRowTiles][kColumns / 8][4],
                                                const uint32_t (&packed)[kRowTiles][kTiles][2],
                                                uint32_t below) {
#pragma unroll
  for (int k = 0; k < kTiles; k += 2) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      uint32_t b[4];
      load_transposed(b, below + Tile<kColumns>::at(8 * k, n));
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const uint32_t a[4] = {packed[r][k][0], packed[r][k][1], packed[r][k + 1][0],
                               packed[r][k + 1][1]};
        multiply_add<Scalar>(c[r][n], a, b[0], b[1]);
        if (n + 1 < kColumns / 8) multiply_add<Scalar>(c[r][n + 1], a, b[2], b[3]);
      }
    }
  }
}

// Scores of keys that are not there become -infinity.
template <int kFirst, int kRowTiles, int kTiles>
__device__ __forceinline__ void mask_from(float (&scores)[kRowTiles][kTiles][4], int keys) {
  const int left = keys - 2 * (lane_id() & 3);
#pragma unroll
  for (int n = kFirst; n < kTiles; ++n) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (8 * n + (i & 1) >= left) scores[r][n][i] = -INFINITY;
      }
    }
  }
}

template <int kRowTiles, int kTiles>
__device__ __forceinline__ void mask(float (&scores)[kRowTiles][kTiles][4], int keys) {
  if (keys >= 8 * kTiles) return;
  if (keys >= 8 * (kTiles - 1)) {
    mask_from<kTiles - 1>(scores, keys);
  } else {
    mask_from<0>(scores, keys);
  }
}

// The largest score of one row of two: of those that four lanes hold.
template <int kTiles>
__device__ __forceinline__ float row_maximum(const float (&scores)[kTiles][4], int row) {
  float result = scores[0][2 * row];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    result = fmaxf(result, fmaxf(scores[n][2 * row], scores[n][2 * row + 1]));
  }
  result = fmaxf(result, __shfl_xor_sync(kWarp, result, 1));
  return fmaxf(result, __shfl_xor_sync(kWarp, result, 2));
}

__device__ __forceinline__ float sum_of_four(float value) {
  value += __shfl_xor_sync(kWarp, value, 1);
  return value + __shfl_xor_sync(kWarp, value, 2);
}

// Writes up to 16 rows, the upper eight and the lower eight times a factor each. Lanes exchange
// words, so that each has 8 bytes, and four of them 32, to store at once.
template <typename Scalar, int kTiles>
__device__ __forceinline__ void store_rows(Scalar* to, int stride, int present,
                                           const float (&c)[kTiles][4],
                                           const float (&factors)[2]) {
  const int lane = lane_id();
  const bool odd = lane & 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    Scalar* const start = to + row * stride;
    const auto packed = [&](int n) {
      return pack_pair<Scalar>(c[n][2 * half] * factors[half], c[n][2 * half + 1] * factors[half]);
    };
#pragma unroll
    for (int n = 0; n + 1 < kTiles; n += 2) {
      const uint32_t first = packed(n);
      const uint32_t second = packed(n + 1);
      const uint32_t got = __shfl_xor_sync(kWarp, odd ? first : second, 1);
      if (row < present) {
        *reinterpret_cast<uint2*>(start + 8 * n + (odd ? 8 : 0) + 2 * (lane & 2)) =
            make_uint2(odd ? got : first, odd ? second : got);
      }
    }
    if (kTiles % 2 != 0 && row < present) {
      *reinterpret_cast<uint32_t*>(start + 8 * (kTiles - 1) + 2 * (lane % 4)) = packed(kTiles - 1);
    }
  }
}

// How many strips the tiles of each head are shared out to: so that blocks fill the card, and none
// of them is left for a turn of its own. A block costs about one tile more than those it takes.
inline int strips_of(int heads, int tiles, int resident) {
  int best = 1;
  float least = INFINITY;
  for (int strips = 1; strips <= std::min(tiles, 256); ++strips) {
    const int64_t blocks = static_cast<int64_t>(heads) * strips;
    const int64_t turns = (blocks + resident - 1) / resident;
    const float cost = static_cast<float>(turns) * (static_cast<float>(tiles) / strips + 1.0f);
    if (cost < least) {
      least = cost;
      best = strips;
    }
  }
  return best;
}

// Blocks of a kernel that are on the current device at once, with so many chunks of keys. Where CUDA
// fails it is 1, and the launch that follows says what is wrong.
template <auto kKernel>
int resident_blocks(int threads, int bytes, int held) {
  static std::atomic<int> known[kDevices][kChunks + 1];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (device < kDevices && known[device][held] > 0) return known[device][held];
  int processors = 0;
  int blocks = 0;
  if (cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes) !=
          cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, threads, bytes) !=
          cudaSuccess ||
      blocks == 0) {
    return 1;
  }
  if (device < kDevices) known[device][held] = blocks * processors;
  return blocks * processors;
}

// Calls launch.operator()<Scalar, kSize>() for a type and a size of heads; what CUDA says of it.
template <typename Launch>
const char* with_size(const CrossAttentionArguments& a, Launch launch) {
  const auto sized = [&]<typename Scalar>() {
    if (a.size == 40) launch.template operator()<Scalar, 40>();
    if (a.size == 64) launch.template operator()<Scalar, 64>();
    if (a.size == 80) launch.template operator()<Scalar, 80>();
    if (a.size == 160) launch.template operator()<Scalar, 160>();
  };
  if (a.type == FloatType::kHalf) {
    sized.template operator()<__half>();
  } else {
    sized.template operator()<__nv_bfloat16>();
  }
  return launch_error();
}

inline Problem problem_of(const CrossAttentionArguments& a, int rows) {
  Problem p = {};
  p.queries = a.queries;
  p.keys = a.keys;
  p.heads = a.heads;
  p.tiles = (a.queries + rows - 1) / rows;
  p.held = 1;
  p.width = a.heads * a.size;
  p.kv_stride = a.kv_stride;
  p.result_stride = a.result_stride;
  p.scale = 1.0f / sqrtf(static_cast<float>(a.size));
  p.power_scale = p.scale * kLog2E;
  return p;
}

}  // namespace
}  // namespace eri
