// What the kernels of cross_attention's backward pass do with the rows of a warp, and with the
// products of a block; see cross_attention_backward.cu.
#pragma once

#include "cross_attention_tiles.h"

namespace eri {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kMoments = 3;  // of a query: -maximum * s * log2(e), 1 / sum, D

// How kernels are cut for a size of heads: what fits into registers and 99 KB of shared memory.
template <int kSize>
struct Cut {
  static constexpr int kKeys = kSize == 160 ? 48 : 80;  // of a chunk
  static constexpr int kKeyTiles = kKeys / 8;
  static constexpr int kRowTiles = 1;
  static constexpr int kBlocks = 2;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kHalf = (kSize / 8 + 1) / 2;  // pieces of a row, half of them
  static constexpr int kBytes =
      Tile<kSize>::bytes(2 * kKeys + 2 * kRows) + 2 * Tile<kKeys>::bytes(kRows);
  static constexpr int kQueryRows = 16 * kWarps;
  static constexpr int query_bytes(int held) {
    return Tile<kSize>::bytes(2 * kKeys * held + 2 * kQueryRows);
  }
  static constexpr bool whole(int keys) { return keys <= kKeys && kSize != 160; }
};

template <typename Scalar>
struct Pointers {
  const Scalar* q;
  const Scalar* kv;
  const Scalar* d_o;
  Scalar* dq;
  float* partial;  // [heads of all samples, strips, keys or values, keys, size]
  float* moments;  // [heads of all samples, queries, kMoments]
};

// What one block looks at of a head.
template <typename Scalar>
struct Head {
  const Scalar* q;
  const Scalar* d_o;
  const Scalar* keys;
  Scalar* dq;
  float* moments;
};

template <typename Scalar, int kSize>
__device__ __forceinline__ Head<Scalar> head_of(const Pointers<Scalar>& at, const Problem& p) {
  const int64_t sample = blockIdx.x / p.heads;
  const int column = static_cast<int>(blockIdx.x) % p.heads * kSize;
  const int64_t rows = sample * p.queries * p.width + column;
  return {at.q + rows, at.d_o + rows, at.kv + sample * p.keys * p.kv_stride + column,
          at.dq + sample * p.queries * p.result_stride + column,
          at.moments + static_cast<int64_t>(blockIdx.x) * p.queries * kMoments};
}

// A chunk of keys and its values.
template <typename Scalar, int kSize>
__device__ __forceinline__ void copy_chunk(uint32_t to, uint32_t values, const Scalar* keys,
                                           int chunk, const Problem& p) {
  constexpr int kKeys = Cut<kSize>::kKeys;
  const int first = chunk * kKeys;
  const Scalar* const from = keys + first * p.kv_stride;
  copy_rows<kSize, kKeys, kThreads>(to, from, p.kv_stride, p.keys - first, threadIdx.x);
  copy_rows<kSize, kKeys, kThreads>(values, from + p.width, p.kv_stride, p.keys - first,
                                    threadIdx.x);
}

// A tile of queries, and of the gradients of their results behind it.
template <typename Scalar, int kSize, int kRows>
__device__ __forceinline__ void copy_tile(uint32_t to, const Head<Scalar>& head, int row,
                                          const Problem& p) {
  copy_rows<kSize, kRows, kThreads>(to, head.q + row * p.width, p.width, p.queries - row,
                                    threadIdx.x);
  copy_rows<kSize, kRows, kThreads>(to + Tile<kSize>::bytes(kRows), head.d_o + row * p.width,
                                    p.width, p.queries - row, threadIdx.x);
}

// The same tile, into the L2 cache only.
template <typename Scalar, int kSize, int kRows>
__device__ __forceinline__ void prefetch_tile(const Head<Scalar>& head, int row, const Problem& p) {
  constexpr int kLines = (2 * kSize + 127) / 128;
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kLines; i += kThreads) {
    const int at = row + i / kLines;
    if (at >= p.queries) break;
    const int column = min(i % kLines * 64, kSize - 1);
    prefetch(head.q + at * p.width + column);
    prefetch(head.d_o + at * p.width + column);
  }
}

// Scores become P, in 16 bits: the whole softmax of two rows ...
template <typename Scalar, int kTiles>
__device__ __forceinline__ void softmax_rows(uint32_t (&packed)[kTiles][2],
                                             float (&scores)[kTiles][4], float scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float offset = -row_maximum(scores, half) * scale;
    float total = 0.0f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        scores[n][i] = power_of_two(fmaf(scores[n][i], scale, offset));
        total += scores[n][i];
      }
    }
    const float factor = 1.0f / sum_of_four(total);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      packed[n][half] = pack_pair<Scalar>(scores[n][2 * half] * factor,
                                          scores[n][2 * half + 1] * factor);
    }
  }
}

// ... or from what is known of the rows.
template <typename Scalar, int kTiles>
__device__ __forceinline__ void known_softmax(uint32_t (&packed)[kTiles][2],
                                              const float (&scores)[kTiles][4],
                                              const float (&moments)[2][kMoments], float scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float pair[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float power = fmaf(scores[n][2 * half + i], scale, moments[half][0]);
        pair[i] = power_of_two(power) * moments[half][1];
      }
      packed[n][half] = pack_pair<Scalar>(pair[0], pair[1]);
    }
  }
}

// The sum of a row of P * dP: of what four lanes hold.
template <typename Scalar, int kTiles>
__device__ __forceinline__ float row_product(const uint32_t (&packed)[kTiles][2],
                                             const float (&dp)[kTiles][4], int half) {
  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float2 pair = unpack_pair<Scalar>(packed[n][half]);
    sum = fmaf(pair.x, dp[n][2 * half], sum);
    sum = fmaf(pair.y, dp[n][2 * half + 1], sum);
  }
  return sum_of_four(sum);
}

// P becomes dS.
template <typename Scalar, int kTiles>
__device__ __forceinline__ void differentiate(uint32_t (&packed)[kTiles][2],
                                              const float (&dp)[kTiles][4], int half, float mean) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float2 pair = unpack_pair<Scalar>(packed[n][half]);
    packed[n][half] = pack_pair<Scalar>(pair.x * (dp[n][2 * half] - mean),
                                        pair.y * (dp[n][2 * half + 1] - mean));
  }
}

// 16 packed rows to shared memory, from where this lane's first word is.
template <int kTiles>
__device__ __forceinline__ void store_packed(uint32_t to, const uint32_t (&packed)[kTiles][2]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_shared(to + Tile<8 * kTiles>::at(8 * half, n), packed[n][half]);
    }
  }
}

// Takes a chunk into what is known of the two rows of a lane; sums are still of what it holds.
template <int kTiles>
__device__ __forceinline__ void add_moments(float (&moments)[2][kMoments],
                                            const float (&scores)[kTiles][4],
                                            const float (&dp)[kTiles][4], float scale, bool first) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float (&known)[kMoments] = moments[half];
    float offset = -row_maximum(scores, half) * scale;
    if (!first) {
      offset = fminf(offset, known[0]);
      const float factor = power_of_two(offset - known[0]);
      known[1] *= factor;
      known[2] *= factor;
    }
    known[0] = offset;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        const float power = power_of_two(fmaf(scores[n][i], scale, offset));
        known[1] += power;
        known[2] = fmaf(power, dp[n][i], known[2]);
      }
    }
  }
}

// What is known of the two rows of a lane; rows that are not there get P = 0.
__device__ __forceinline__ void load_moments(float (&to)[2][kMoments], const float* from, int row,
                                             int queries) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = row + lane_id() / 4 + 8 * half;
#pragma unroll
    for (int i = 0; i < kMoments; ++i) {
      to[half][i] = at < queries ? from[at * kMoments + i] : 0.0f;
    }
  }
}

// sums[m][n] += a quarter of dk and dv: rows of `left`, transposed, times columns of `right`.
template <typename Scalar, int kSize>
__device__ __forceinline__ void add_products(
    float (&sums)[Cut<kSize>::kKeyTiles / 2][Cut<kSize>::kHalf][4], uint32_t left,
    uint32_t right) {
  using C = Cut<kSize>;
#pragma unroll
  for (int row = 0; row < C::kRows; row += 16) {
    uint32_t b[(C::kHalf + 1) / 2][4];
#pragma unroll
    for (int n = 0; n < C::kHalf; n += 2) {
      load_transposed(b[n / 2], right + Tile<kSize>::at(row, n));
    }
#pragma unroll
    for (int m = 0; m < C::kKeyTiles / 2; ++m) {
      uint32_t a[4];
      load_transposed(a, left + Tile<C::kKeys>::at(row, 2 * m));
#pragma unroll
      for (int n = 0; n < C::kHalf; ++n) {
        multiply_add<Scalar>(sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
}

template <int kSize>
__device__ __forceinline__ void store_sums(
    float* to, const float (&sums)[Cut<kSize>::kKeyTiles / 2][Cut<kSize>::kHalf][4], int column,
    int keys) {
  const int lane = lane_id();
#pragma unroll
  for (int m = 0; m < Cut<kSize>::kKeyTiles / 2; ++m) {
#pragma unroll
    for (int n = 0; n < Cut<kSize>::kHalf; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = 16 * m + lane / 4 + 8 * half;
        if (key >= keys || column + n >= kSize / 8) continue;
        *reinterpret_cast<float2*>(to + key * kSize + 8 * (column + n) + 2 * (lane % 4)) =
            make_float2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
      }
    }
  }
}

}  // namespace
}  // namespace eri
