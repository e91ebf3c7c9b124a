// o = softmax(q k^T / sqrt(D)) v. A block has the keys and values of a head in shared memory and
// takes a strip of its queries. Up to 80 keys, which is what a prompt has, all scores of a query
// are in registers at once: one softmax, no rescaling, and warps that never wait for each other.
// More keys come in chunks of 80, and what was added up so far is rescaled for each.

#include "cross_attention_tiles.h"

namespace eri {
namespace {

constexpr int kKeys = 80;  // of a chunk
constexpr int kKeyTiles = kKeys / 8;

// How a kernel is cut for a size of heads; kMany is for more than one chunk.
template <int kSize, bool kMany>
struct Cut {
  static constexpr int kWarps = kMany && kSize != 80 ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = kSize == 160 ? 8 / kWarps : kMany ? 2 : kSize == 80 ? 3 : 4;
  static constexpr int kRowTiles = 1;  // of a warp; 2 are slower: fewer warps fit
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int bytes(int held) { return Tile<kSize>::bytes(2 * kKeys * held + kRows); }
};

template <typename Scalar, int kSize, bool kMany>
__global__ void __launch_bounds__(Cut<kSize, kMany>::kThreads, Cut<kSize, kMany>::kBlocks)
    forward_kernel(const Scalar* __restrict__ q, const Scalar* __restrict__ kv,
                   Scalar* __restrict__ o, const Problem p) {
  using C = Cut<kSize, kMany>;
  constexpr int kRowTiles = C::kRowTiles;
  constexpr int kChunkBytes = Tile<kSize>::bytes(kKeys);
  extern __shared__ uint4 shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t keys = shared_address(shared);
  const int held = kMany ? p.held : 1;
  const int chunks = kMany ? (p.keys + kKeys - 1) / kKeys : 1;
  const uint32_t values = keys + held * kChunkBytes;
  const uint32_t own = values + held * kChunkBytes + Tile<kSize>::bytes(warp * C::kWarpRows);
  const uint32_t keys_beside = Tile<kSize>::beside(keys);
  const uint32_t values_below = Tile<kSize>::below(values);
  const uint32_t own_below = Tile<kSize>::below(own);

  const int64_t sample = blockIdx.x / p.heads;
  const int column = static_cast<int>(blockIdx.x) % p.heads * kSize;
  const Scalar* const of_keys = kv + sample * p.keys * p.kv_stride + column;
  const Scalar* const of_queries = q + sample * p.queries * p.width + column;
  Scalar* const result = o + sample * p.queries * p.result_stride + column;
  const int first = static_cast<int>(static_cast<int64_t>(p.tiles) * blockIdx.y / p.strips);
  const int last = static_cast<int>(static_cast<int64_t>(p.tiles) * (blockIdx.y + 1) / p.strips);

  const auto copy_keys = [&](int chunk) {
    const Scalar* const from = of_keys + chunk * kKeys * p.kv_stride;
    const int left = p.keys - chunk * kKeys;
    const uint32_t place = held > 1 ? chunk * kChunkBytes : 0;
    copy_rows<kSize, kKeys, C::kThreads>(keys + place, from, p.kv_stride, left, threadIdx.x);
    copy_rows<kSize, kKeys, C::kThreads>(values + place, from + p.width, p.kv_stride, left,
                                         threadIdx.x);
  };
  const auto copy_queries = [&](int tile) {
    const int row = tile * C::kRows + warp * C::kWarpRows;
    copy_rows<kSize, C::kWarpRows, 32>(own, of_queries + row * p.width, p.width, p.queries - row,
                                       lane_id());
  };

  copy_queries(first);
  for (int chunk = 0; chunk < held; ++chunk) copy_keys(chunk);
  for (int tile = first; tile < last; ++tile) {
    float sums[kRowTiles][kSize / 8][4] = {};
    float top[kRowTiles][2];
    float total[kRowTiles][2] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const bool streamed = kMany && held < chunks;
      if (streamed && tile + chunk > first) {
        __syncthreads();
        copy_keys(chunk);
      }
      if (chunk == 0 || streamed) {
        wait_for_copies();
        if (tile == first || streamed) {
          __syncthreads();
        } else {
          __syncwarp();
        }
      }
      const uint32_t place = kMany && !streamed ? chunk * kChunkBytes : 0;
      float scores[kRowTiles][kKeyTiles][4];
      multiply_rows<Scalar, kSize>(scores, own_below, keys_beside + place);
      if (chunk + 1 == chunks && tile + 1 < last) {
        __syncwarp();
        copy_queries(tile + 1);
      }
      mask(scores, p.keys - chunk * kKeys);
      uint32_t packed[kRowTiles][kKeyTiles][2];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float most = row_maximum(scores[r], half);
          if (kMany && chunk > 0) {
            most = fmaxf(most, top[r][half]);
            const float factor = power_of_two((top[r][half] - most) * p.power_scale);
            total[r][half] *= factor;
#pragma unroll
            for (int n = 0; n < kSize / 8; ++n) {
              sums[r][n][2 * half] *= factor;
              sums[r][n][2 * half + 1] *= factor;
            }
          }
          top[r][half] = most;
          const float offset = -most * p.power_scale;
#pragma unroll
          for (int n = 0; n < kKeyTiles; ++n) {
            float pair[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              pair[i] = power_of_two(fmaf(scores[r][n][2 * half + i], p.power_scale, offset));
              total[r][half] += pair[i];
            }
            packed[r][n][half] = pack_pair<Scalar>(pair[0], pair[1]);
          }
        }
      }
      multiply_packed<Scalar, kSize>(sums, packed, values_below + place);
    }
    const int row = tile * C::kRows + warp * C::kWarpRows;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const float factors[2] = {1.0f / sum_of_four(total[r][0]), 1.0f / sum_of_four(total[r][1])};
      store_rows(result + (row + 16 * r) * p.result_stride, p.result_stride,
                 p.queries - row - 16 * r, sums[r], factors);
    }
  }
}

template <typename Scalar, int kSize, bool kMany>
void launch(const CrossAttentionArguments& a, cudaStream_t stream) {
  using C = Cut<kSize, kMany>;
  Problem p = problem_of(a, C::kRows);
  const int chunks = (a.keys + kKeys - 1) / kKeys;
  if (C::bytes(chunks) <= kSharedBytes) p.held = chunks;
  const int bytes = C::bytes(p.held);
  const int resident =
      resident_blocks<forward_kernel<Scalar, kSize, kMany>>(C::kThreads, bytes, p.held);
  p.strips = strips_of(a.batch * a.heads, p.tiles, resident);
  const dim3 blocks(a.batch * a.heads, p.strips);
  forward_kernel<Scalar, kSize, kMany><<<blocks, C::kThreads, bytes, stream>>>(
      static_cast<const Scalar*>(a.q), static_cast<const Scalar*>(a.kv),
      static_cast<Scalar*>(a.result), p);
}

}  // namespace

const char* launch_cross_attention(const CrossAttentionArguments& arguments, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  return with_size(arguments, [&]<typename Scalar, int kSize>() {
    if (arguments.keys <= kKeys) {
      launch<Scalar, kSize, false>(arguments, stream);
    } else {
      launch<Scalar, kSize, true>(arguments, stream);
    }
  });
}

}  // namespace eri
