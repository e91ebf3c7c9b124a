// With P = softmax(s q k^T), dP = do v^T, D the sums of the rows of P * dP and dS = P * (dP - D):
// dq = s dS k, dk = s dS^T q, dv = P^T do. P is computed again, so nothing but q and kv was kept.
//
// strip_kernel: a block has a chunk of a head's keys and values in shared memory and takes a strip
// of its queries. A warp works out P and dS of its own queries and, where the chunk holds all keys,
// dq; P and dS go to shared memory, and each warp adds up, in registers, its own quarter of dk and
// dv over the strip: half of the columns of one of them. sum_kernel adds the strips, in their
// order. Where there are more keys than a chunk holds, query_kernel comes first: it goes twice
// through the chunks, for the moments of each query's softmax and then for dq.

#include "cross_attention_gradients.h"

namespace eri {
namespace {

constexpr int kSumThreads = 256;

template <typename Scalar, int kSize, bool kWhole>
__global__ void __launch_bounds__(kThreads, Cut<kSize>::kBlocks)
    strip_kernel(const Pointers<Scalar> at, const Problem p) {
  using C = Cut<kSize>;
  extern __shared__ uint4 shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t keys = shared_address(shared);
  const uint32_t values = keys + Tile<kSize>::bytes(C::kKeys);
  const uint32_t queries = values + Tile<kSize>::bytes(C::kKeys);
  const uint32_t gradients = queries + Tile<kSize>::bytes(C::kRows);
  const uint32_t weights = gradients + Tile<kSize>::bytes(C::kRows);  // P
  const uint32_t slopes = weights + Tile<C::kKeys>::bytes(C::kRows);  // dS
  const int chunk = kWhole ? 0 : static_cast<int>(blockIdx.z);
  const int first = static_cast<int>(static_cast<int64_t>(p.tiles) * blockIdx.y / p.strips);
  const int last = static_cast<int>(static_cast<int64_t>(p.tiles) * (blockIdx.y + 1) / p.strips);
  const Head<Scalar> head = head_of<Scalar, kSize>(at, p);

  // dk by the first two warps, dv by the others; the left half of its columns, and the right
  const bool of_values = warp >= 2;
  const int column = warp % 2 * C::kHalf;
  float sums[C::kKeyTiles / 2][C::kHalf][4] = {};

  const int own = warp * C::kWarpRows;
  const uint32_t keys_beside = Tile<kSize>::beside(keys);
  const uint32_t keys_below = Tile<kSize>::below(keys);
  const uint32_t own_below = Tile<kSize>::below(queries + Tile<kSize>::bytes(own));
  const uint32_t left = Tile<C::kKeys>::beside(of_values ? weights : slopes);
  const uint32_t right =
      Tile<kSize>::below((of_values ? gradients : queries) + Tile<kSize>::at(0, column));
  const uint32_t word =
      kept(weights + Tile<C::kKeys>::at(own + lane_id() / 4, 0) + 4 * (lane_id() % 4));

  copy_chunk<Scalar, kSize>(keys, values, head.keys, chunk, p);
  copy_tile<Scalar, kSize, C::kRows>(queries, head, first * C::kRows, p);
  for (int tile = first; tile < last; ++tile) {
    const int row = tile * C::kRows + own;
    wait_for_copies();
    __syncthreads();
    if (tile + 1 < last) {
      prefetch_tile<Scalar, kSize, C::kRows>(head, (tile + 1) * C::kRows, p);
    }
    uint32_t packed[C::kRowTiles][C::kKeyTiles][2];
    float moments[C::kRowTiles][2][kMoments];
    float block[C::kRowTiles][C::kKeyTiles][4];
    multiply_rows<Scalar, kSize>(block, own_below, keys_beside);
    mask(block, p.keys - chunk * C::kKeys);
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
      if (kWhole) {
        softmax_rows<Scalar>(packed[r], block[r], p.power_scale);
      } else {
        load_moments(moments[r], head.moments, row + 16 * r, p.queries);
        known_softmax<Scalar>(packed[r], block[r], moments[r], p.power_scale);
      }
      store_packed(word + Tile<C::kKeys>::at(16 * r, 0), packed[r]);
    }
    multiply_rows<Scalar, kSize>(block, own_below + Tile<kSize>::bytes(C::kRows),
                                 keys_beside + Tile<kSize>::bytes(C::kKeys));
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float mean =
            kWhole ? row_product<Scalar>(packed[r], block[r], half) : moments[r][half][2];
        differentiate<Scalar>(packed[r], block[r], half, mean);
      }
      store_packed(word + Tile<C::kKeys>::at(C::kRows + 16 * r, 0), packed[r]);
    }
    if constexpr (kWhole) {
      float dq[C::kRowTiles][kSize / 8][4] = {};
      multiply_packed<Scalar, kSize>(dq, packed, keys_below);
      const float factors[2] = {p.scale, p.scale};
#pragma unroll
      for (int r = 0; r < C::kRowTiles; ++r) {
        store_rows(head.dq + (row + 16 * r) * p.result_stride, p.result_stride,
                   p.queries - row - 16 * r, dq[r], factors);
      }
    }
    __syncthreads();
    add_products<Scalar, kSize>(sums, left, right);
    __syncthreads();
    if (tile + 1 < last) {
      copy_tile<Scalar, kSize, C::kRows>(queries, head, (tile + 1) * C::kRows, p);
    }
  }
  const int64_t strip = static_cast<int64_t>(blockIdx.x) * p.strips + blockIdx.y;
  float* const to = at.partial + (2 * strip + of_values) * p.keys * kSize;
  store_sums<kSize>(to + chunk * C::kKeys * kSize, sums, column, p.keys - chunk * C::kKeys);
}

template <typename Scalar, int kSize>
__global__ void __launch_bounds__(kThreads, 2)
    query_kernel(const Pointers<Scalar> at, const Problem p) {
  using C = Cut<kSize>;
  constexpr int kChunkBytes = Tile<kSize>::bytes(C::kKeys);
  extern __shared__ uint4 shared[];
  const int own = static_cast<int>(threadIdx.x) / 32 * 16;  // a warp's rows of the tile
  const uint32_t keys = shared_address(shared);
  const uint32_t values = keys + p.held * kChunkBytes;
  const uint32_t queries = values + p.held * kChunkBytes;
  const uint32_t keys_beside = Tile<kSize>::beside(keys);
  const uint32_t keys_below = Tile<kSize>::below(keys);
  const uint32_t values_beside = Tile<kSize>::beside(values);
  const uint32_t own_below = Tile<kSize>::below(queries + Tile<kSize>::bytes(own));
  const Head<Scalar> head = head_of<Scalar, kSize>(at, p);
  const int chunks = (p.keys + C::kKeys - 1) / C::kKeys;
  const bool streamed = p.held < chunks;
  const int first = static_cast<int>(static_cast<int64_t>(p.tiles) * blockIdx.y / p.strips);
  const int last = static_cast<int>(static_cast<int64_t>(p.tiles) * (blockIdx.y + 1) / p.strips);

  for (int chunk = 0; !streamed && chunk < chunks; ++chunk) {
    const uint32_t place = chunk * kChunkBytes;
    copy_chunk<Scalar, kSize>(keys + place, values + place, head.keys, chunk, p);
  }
  for (int tile = first; tile < last; ++tile) {
    const int row = tile * C::kQueryRows;
    if (tile > first) __syncthreads();
    copy_tile<Scalar, kSize, C::kQueryRows>(queries, head, row, p);
    float moments[2][kMoments] = {};
    float dq[1][kSize / 8][4] = {};
    for (int step = 0; step < 2 * chunks; ++step) {
      const int chunk = step < chunks ? step : step - chunks;
      const uint32_t place = streamed ? 0 : chunk * kChunkBytes;
      if (streamed) {
        if (step > 0) __syncthreads();
        copy_chunk<Scalar, kSize>(keys, values, head.keys, chunk, p);
      }
      if (streamed || step == 0) {
        wait_for_copies();
        __syncthreads();
      }
      float scores[1][C::kKeyTiles][4];
      float dp[1][C::kKeyTiles][4];
      multiply_rows<Scalar, kSize>(scores, own_below, keys_beside + place);
      mask(scores, p.keys - chunk * C::kKeys);
      multiply_rows<Scalar, kSize>(dp, own_below + Tile<kSize>::bytes(C::kQueryRows),
                                   values_beside + place);
      if (step < chunks) {
        add_moments(moments, scores[0], dp[0], p.power_scale, step == 0);
        continue;
      }
      if (step == chunks) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          moments[half][1] = 1.0f / sum_of_four(moments[half][1]);
          moments[half][2] = sum_of_four(moments[half][2]) * moments[half][1];
        }
      }
      uint32_t packed[1][C::kKeyTiles][2];
      known_softmax<Scalar>(packed[0], scores[0], moments, p.power_scale);
      differentiate<Scalar>(packed[0], dp[0], 0, moments[0][2]);
      differentiate<Scalar>(packed[0], dp[0], 1, moments[1][2]);
      multiply_packed<Scalar, kSize>(dq, packed, keys_below + place);
    }
    const float factors[2] = {p.scale, p.scale};
    store_rows(head.dq + (row + own) * p.result_stride, p.result_stride, p.queries - row - own,
               dq[0], factors);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int of = row + own + lane_id() / 4 + 8 * half;
      if (of >= p.queries || lane_id() % 4 != 0) continue;
#pragma unroll
      for (int i = 0; i < kMoments; ++i) head.moments[of * kMoments + i] = moments[half][i];
    }
  }
}

// dkv, 16 bytes a thread: the sum over strips.
template <typename Scalar, int kSize>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const float* __restrict__ partial, Scalar* __restrict__ dkv, int vectors,
               int dkv_stride, const Problem p) {
  const int i = static_cast<int>(blockIdx.x) * kSumThreads + static_cast<int>(threadIdx.x);
  if (i >= vectors) return;
  constexpr int kPieces = kSize / 8;
  const int piece = i % kPieces;
  const int head = i / kPieces % p.heads;
  const int of_values = i / kPieces / p.heads % 2;
  const int key = i / kPieces / p.heads / 2 % p.keys;
  const int sample = i / kPieces / p.heads / 2 / p.keys;
  const int64_t strip = static_cast<int64_t>(sample * p.heads + head) * p.strips;
  const int64_t step = 2 * p.keys * kSize / 4;
  const float4* from = reinterpret_cast<const float4*>(
      partial + (2 * strip + of_values) * p.keys * kSize + key * kSize + 8 * piece);
  float sums[8] = {};
#pragma unroll 4
  for (int k = 0; k < p.strips; ++k) {
    const float4 low = __ldcs(from + k * step);
    const float4 high = __ldcs(from + k * step + 1);
    sums[0] += low.x;
    sums[1] += low.y;
    sums[2] += low.z;
    sums[3] += low.w;
    sums[4] += high.x;
    sums[5] += high.y;
    sums[6] += high.z;
    sums[7] += high.w;
  }
  const float factor = of_values ? 1.0f : p.scale;
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    words[w] = pack_pair<Scalar>(sums[2 * w] * factor, sums[2 * w + 1] * factor);
  }
  Scalar* const row = dkv + static_cast<int64_t>(sample * p.keys + key) * dkv_stride;
  *reinterpret_cast<uint4*>(row + of_values * p.width + head * kSize + 8 * piece) =
      make_uint4(words[0], words[1], words[2], words[3]);
}

template <typename Scalar, int kSize>
int strips_on_device(const CrossAttentionArguments& a) {
  using C = Cut<kSize>;
  const bool whole = C::whole(a.keys);
  const int chunks = (a.keys + C::kKeys - 1) / C::kKeys;
  const auto resident_of = [&]<bool kWhole>() {
    return resident_blocks<strip_kernel<Scalar, kSize, kWhole>>(kThreads, C::kBytes, 1);
  };
  int resident = 0;
  if constexpr (kSize != 160) {
    if (whole) resident = resident_of.template operator()<true>();
  }
  if (!whole) resident = resident_of.template operator()<false>();
  return strips_of(a.batch * a.heads * chunks, problem_of(a, C::kRows).tiles, resident);
}

template <typename Scalar, int kSize>
void launch(const CrossAttentionArguments& a, cudaStream_t stream) {
  using C = Cut<kSize>;
  Problem p = problem_of(a, C::kRows);
  p.strips = a.strips;
  const int heads = a.batch * a.heads;
  float* const moments = a.work + 2LL * heads * p.strips * a.keys * kSize;
  const Pointers<Scalar> at = {
      static_cast<const Scalar*>(a.q),   static_cast<const Scalar*>(a.kv),
      static_cast<const Scalar*>(a.d_o), static_cast<Scalar*>(a.result),
      a.work,                            moments};
  if (C::whole(a.keys)) {
    if constexpr (kSize != 160) {
      strip_kernel<Scalar, kSize, true>
          <<<dim3(heads, p.strips), kThreads, C::kBytes, stream>>>(at, p);
    }
  } else {
    const int chunks = (a.keys + C::kKeys - 1) / C::kKeys;
    Problem of_queries = problem_of(a, C::kQueryRows);
    if (C::query_bytes(chunks) <= kSharedBytes) of_queries.held = chunks;
    const int bytes = C::query_bytes(of_queries.held);
    const int resident =
        resident_blocks<query_kernel<Scalar, kSize>>(kThreads, bytes, of_queries.held);
    of_queries.strips = strips_of(heads, of_queries.tiles, resident);
    query_kernel<Scalar, kSize>
        <<<dim3(heads, of_queries.strips), kThreads, bytes, stream>>>(at, of_queries);
    strip_kernel<Scalar, kSize, false>
        <<<dim3(heads, p.strips, chunks), kThreads, C::kBytes, stream>>>(at, p);
  }
  const int vectors = heads * a.keys * 2 * kSize / 8;
  sum_kernel<Scalar, kSize><<<(vectors + kSumThreads - 1) / kSumThreads, kSumThreads, 0, stream>>>(
      a.work, static_cast<Scalar*>(a.dkv), vectors, a.dkv_stride, p);
}

}  // namespace

const char* launch_cross_attention_backward(const CrossAttentionArguments& arguments,
                                            void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  return with_size(arguments, [&]<typename Scalar, int kSize>() {
    launch<Scalar, kSize>(arguments, stream);
  });
}

const char* plan_cross_attention_backward(CrossAttentionArguments& a, int64_t* work) {
  return with_size(a, [&]<typename Scalar, int kSize>() {
    a.strips = strips_on_device<Scalar, kSize>(a);
    const int64_t heads = a.batch * a.heads;
    *work = 2 * heads * a.strips * a.keys * kSize;
    if (!Cut<kSize>::whole(a.keys)) *work += heads * a.queries * kMoments;
  });
}

}  // namespace eri
