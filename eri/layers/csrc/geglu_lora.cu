// A warp takes 64 values, their gates and what becomes of them, of eight tokens at a time, through
// a ring of shared memory of its own: eight lanes copy 128 bytes of a row there, and back again. In
// between a lane works on eight columns of two tokens, and what it gets is, but for the order of
// halves, the second operand that tensor cores take for a sum over the tokens: columns 8 g + j of
// all lanes are the j-th eight columns of a product. The warps of a block share its tokens, and so
// do the blocks of a cluster (from sm_90 on). All warps' sums of one number are added in a fixed
// order, by one thread.
//
// Of the product of du with the ranks of B every slab of columns has a part, which a second kernel
// adds up: less to read than du.

#include "cluster.h"
#include "geglu_lora.h"
#include "geglu_normal.h"
#include "launch.h"
#include "tensor_cores.h"
#include "vectors.h"

namespace eri {
namespace {

constexpr int kSlab = static_cast<int>(kGegluLoraSlab);  // columns of a warp
constexpr int kStep = 8;          // tokens of a stage of the ring
constexpr int kRanks = static_cast<int>(kGegluLoraRanks);
constexpr int kTile = kStep * kSlab * 2;      // bytes of da, of values, of gates in a stage
constexpr int kStage = 3 * kTile + 32 * 16;   // and of p and h
constexpr int kUp = kRanks * 2 * kSlab * 2;   // bytes of a slab of B
constexpr int kSums = 3;          // to values, to gates, of results
constexpr int kWarpSums = kSums * 8 * 32;  // vectors of four
constexpr int kClusterBlocks = 3;  // that a processor of a card with clusters holds

struct GateProblem {
  Rows<const uint4> da, u;
  Rows<uint4> du;
  Rows<const uint4> p, h;
  float* d_down;
  float* d_up;
  Rows<const uint4> up;
  float* parts;             // [slabs, tokens, ranks of h]
  uint32_t tokens;
  int columns;              // vectors of a row of da
  int out_rank, in_rank;
  int out_vectors, in_vectors;  // of a row of p and h, one or two
  int splits;               // of the tokens: blocks of a cluster
};

__device__ __forceinline__ Vector<uint32_t> load_shared(uint32_t from) {
  Vector<uint32_t> to;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.words[0]), "=r"(to.words[1]), "=r"(to.words[2]), "=r"(to.words[3])
               : "r"(from)
               : "memory");
  return to;
}

__device__ __forceinline__ void store_shared(uint32_t to, const Vector<uint32_t>& from) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(from.words[0]),
               "r"(from.words[1]), "r"(from.words[2]), "r"(from.words[3])
               : "memory");
}

// Of a vector of a token in its tile, permuted so that neither eight lanes that copy a row nor
// eight that take two columns of four tokens meet in a bank.
__device__ __forceinline__ uint32_t place_of(uint32_t token, uint32_t column) {
  return token * (kSlab * 2) + (column ^ (token & 6)) * 16;
}

// Of a vector of a rank in a slab of B: values, then gates; likewise.
__device__ __forceinline__ uint32_t up_place_of(uint32_t rank, uint32_t vector) {
  return (rank * (kSlab / 4) + (vector ^ rank % 8)) * 16;
}

// Two numbers side by side: of da, a value and a gate; becomes their gradients and the result.
template <typename Scalar>
struct Pair {
  uint32_t to_value, to_gate, again;

  __device__ __forceinline__ Pair(uint32_t gradient, uint32_t value, uint32_t gate) {
    const float2 d = unpack_pair<Scalar>(gradient), v = unpack_pair<Scalar>(value);
    const float2 g = unpack_pair<Scalar>(gate);
    const Normal x = normal<Scalar>(g.x), y = normal<Scalar>(g.y);
    const float gx = g.x * x.cdf, gy = g.y * y.cdf;
    again = pack_pair<Scalar>(v.x * gx, v.y * gy);
    to_value = pack_pair<Scalar>(d.x * gx, d.y * gy);
    to_gate = pack_pair<Scalar>(v.x * (d.x * fmaf(g.x, x.density, x.cdf)),
                                v.y * (d.y * fmaf(g.y, y.density, y.cdf)));
  }
};

template <int kWarps>
struct Memory {
  static constexpr int kStages = kWarps == 4 ? 5 : 3;
  static constexpr int kRing = kWarps * kStages * kStage;
  static constexpr int kReduced = kWarps / 2 * kWarpSums * 16;
  static constexpr int kBytes = (kRing > kReduced ? kRing : kReduced) + kUp;
};

template <typename Scalar, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kWarps == 4 ? kClusterBlocks : 1)
    gate_kernel(const __grid_constant__ GateProblem a) {
  constexpr int kStages = Memory<kWarps>::kStages;
  extern __shared__ uint4 memory[];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int split = static_cast<int>(blockIdx.x) % a.splits;
  const int slab = static_cast<int>(blockIdx.x) / a.splits;
  const uint32_t ring = shared_address(memory) + warp * kStages * kStage;
  const uint32_t up = shared_address(memory) + Memory<kWarps>::kBytes - kUp;
  for (int i = static_cast<int>(threadIdx.x); i < kUp / 16; i += 32 * kWarps) {
    const int rank = i / (kSlab / 4), vector = i % (kSlab / 4), half = vector / (kSlab / 8);
    const int place = slab * (kSlab / 8) + vector % (kSlab / 8);
    const bool none = rank >= 8 * a.in_vectors || place >= a.columns;
    copy_async(up + up_place_of(rank, vector),
               none ? a.up.first : a.up[rank] + half * a.columns + place, none);
  }
  end_of_stage();
  wait_for_stage<0>();
  __syncthreads();

  // copied: this vector of every fourth token
  const int column = slab * (kSlab / 8) + lane % 8;
  const bool there = column < a.columns;
  const uint32_t row = lane / 8;
  const uint32_t stride = a.splits * kWarps * kStep;  // tokens
  const uint32_t first = (split * kWarps + warp) * kStep;

  // of p or h: half a row of ranks of a token
  const bool is_h = lane >= 16;
  const Rows<const uint4> small = is_h ? a.h : a.p;
  const bool has_ranks = lane % 2 < (is_h ? a.in_vectors : a.out_vectors);
  const uint32_t rank_token = lane / 2 % 8;

  uint32_t next = first;  // token to fetch
  const auto fetch = [&](int stage) {
    if (next < a.tokens) {
      const uint32_t to = ring + stage * kStage;
#pragma unroll
      for (int k = 0; k < kStep; k += 4) {
        const bool none = !there || next + row + k >= a.tokens;
        const uint32_t token = none ? 0 : next + row + k;
        const uint4* u = a.u[token] + (none ? 0 : column);
        const uint32_t place = to + place_of(row + k, lane % 8);
        copy_async(place, a.da[token] + (none ? 0 : column), none);
        copy_async(place + kTile, u, none);
        copy_async(place + 2 * kTile, u + a.columns, none);
      }
      const bool none = !has_ranks || next + rank_token >= a.tokens;
      copy_async(to + 3 * kTile + lane * 16,
                 small[none ? 0 : next + rank_token] + (none ? 0 : lane % 2), none);
    }
    end_of_stage();
    next += stride;
  };

  float sums[kSums][8][4] = {};
  const auto add = [&](uint32_t token, int stage) {
    const uint32_t from = ring + stage * kStage;
    const uint32_t places[2] = {from + place_of(lane % 4 * 2, lane / 4),
                                from + place_of(lane % 4 * 2 + 1, lane / 4)};
    Vector<uint32_t> gradients[2], values[2], gates[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      gradients[k] = load_shared(places[k]);
      values[k] = load_shared(places[k] + kTile);
      gates[k] = load_shared(places[k] + 2 * kTile);
    }
    // ranks 0 to 7 and 8 to 15 of p, then of h; of eight tokens each
    uint32_t ranks[4];
    load_transposed(ranks,
                    from + 3 * kTile + lane / 16 * 256 + lane % 8 * 32 + lane / 8 % 2 * 16);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const Pair<Scalar> one(gradients[0].words[w], values[0].words[w], gates[0].words[w]);
      const Pair<Scalar> two(gradients[1].words[w], values[1].words[w], gates[1].words[w]);
      values[0].words[w] = one.to_value, values[1].words[w] = two.to_value;
      gates[0].words[w] = one.to_gate, gates[1].words[w] = two.to_gate;
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // columns 2 w and 2 w + 1 of both tokens
        const uint32_t halves = half == 0 ? 0x5410 : 0x7632;
        const int j = 2 * w + half;
        multiply_add_eight<Scalar>(sums[0][j], ranks[2], ranks[3],
                                   __byte_perm(one.to_value, two.to_value, halves));
        multiply_add_eight<Scalar>(sums[1][j], ranks[2], ranks[3],
                                   __byte_perm(one.to_gate, two.to_gate, halves));
        multiply_add_eight<Scalar>(sums[2][j], ranks[0], ranks[1],
                                   __byte_perm(one.again, two.again, halves));
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      store_shared(places[k] + kTile, values[k]);
      store_shared(places[k] + 2 * kTile, gates[k]);
    }
    __syncwarp();
    float parts[2][4] = {};  // of ranks, and of those from the eighth on, of two tokens each
#pragma unroll
    for (int q = 0; q < 4; ++q) {  // 32 columns each, of values and then of gates
      uint32_t columns[4];
      load_matrices(columns, from + kTile * (1 + q / 2) + place_of(lane % 8, q % 2 * 4 + lane / 8));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t of_up[4];
        load_matrices(of_up, up + up_place_of(lane % 16, 4 * q + 2 * half + lane / 16));
        multiply_add<Scalar>(parts[half], of_up, columns[2 * half], columns[2 * half + 1]);
      }
    }
    float* part = a.parts + (static_cast<int64_t>(slab) * a.tokens + token) * 8 * a.in_vectors;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = lane % 4 * 2 + i % 2, rank = lane / 4 + i / 2 * 8;
      if (token + at < a.tokens && rank < 8 * a.in_vectors) {
        part[at * 8 * a.in_vectors + rank] = parts[0][i] + parts[1][i];
      }
    }
#pragma unroll
    for (int k = 0; k < kStep; k += 4) {
      if (!there || token + row + k >= a.tokens) continue;
      const uint32_t place = from + place_of(row + k, lane % 8);
      uint4* to = a.du[token + row + k] + column;
      store(to, load_shared(place + kTile));
      store(to + a.columns, load_shared(place + 2 * kTile));
    }
  };

#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage);
#pragma unroll 1
  for (uint32_t token = first, stage = 0; token < a.tokens; token += stride) {
    wait_for_stage<kStages - 2>();
    __syncwarp();
    fetch(stage == 0 ? kStages - 1 : stage - 1);
    add(token, stage);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  wait_for_stage<0>();
  __syncthreads();

  // onto the sums of the lower half of the warps those of the upper half, until one has all of them
  float4* shared = reinterpret_cast<float4*>(memory);
  const auto each = [&](int slot, auto visit) {
    float4* mine = shared + slot * kWarpSums + lane;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int j = 0; j < 8; ++j) visit(mine[(8 * s + j) * 32], sums[s][j]);
    }
  };
  const auto give = [](float4& to, float(&sum)[4]) {
    to = make_float4(sum[0], sum[1], sum[2], sum[3]);
  };
#pragma unroll 1
  for (int half = kWarps / 2; half > 0; half /= 2) {
    if (half <= warp && warp < 2 * half) each(warp - half, give);
    __syncthreads();
    if (warp < half) {
      each(warp, [](float4& from, float(&sum)[4]) {
        sum[0] += from.x, sum[1] += from.y, sum[2] += from.z, sum[3] += from.w;
      });
    }
    __syncthreads();
  }
  if (warp == 0) each(0, give);
  wait_for_cluster(a.splits);
  const float* all = reinterpret_cast<const float*>(memory);
#pragma unroll 4
  for (int place = split * 32 * kWarps + static_cast<int>(threadIdx.x);
       place < kSums * kRanks * kSlab; place += a.splits * 32 * kWarps) {
    // side by side as they lie in the results
    const int which = place / (kRanks * kSlab), in = place % (kRanks * kSlab);
    const bool is_down = which == 2;
    const int rank = is_down ? in / kSlab : in % kRanks;
    const int at = is_down ? in % kSlab : in / kRanks;
    const int wide = slab * kSlab + at;
    if (wide >= 8 * a.columns || rank >= (is_down ? a.out_rank : a.in_rank)) continue;
    // of the product of columns 8 g + j, lane and place of rank and g
    const int g = at / 8, j = at % 8;
    const int word = ((8 * which + j) * 32 + rank % 8 * 4 + g / 2) * 4 + rank / 8 * 2 + g % 2;
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < a.splits; ++i) sum += *shared_of_cluster(all + word, i, a.splits);
    float* to = is_down ? a.d_down + static_cast<int64_t>(rank) * 8 * a.columns + wide
                        : a.d_up + static_cast<int64_t>(which * 8 * a.columns + wide) * a.in_rank +
                              rank;
    // nothing else is added there, so no order can change it; no thread waits for what was there
    atomicAdd(to, sum);
  }
  wait_for_cluster(a.splits);  // nobody's shared memory goes before all have read it
}

// A thread adds up the parts of two ranks of a token.
constexpr int kSumThreads = 128;

template <typename Scalar>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const float2* __restrict__ parts, uint32_t* __restrict__ hidden, Rows<uint32_t> tail,
               float scale, uint32_t tokens, uint32_t pairs, int slabs) {
  const uint32_t place = blockIdx.x * kSumThreads + threadIdx.x;
  if (place >= tokens * pairs) return;
  float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 16
  for (int slab = 0; slab < slabs; ++slab) {
    const float2 part = parts[static_cast<int64_t>(slab) * tokens * pairs + place];
    sum.x += part.x, sum.y += part.y;
  }
  const uint32_t word = pack_pair<Scalar>(scale * sum.x, scale * sum.y);
  hidden[place] = word;
  tail[place / pairs][place % pairs] = word;
}

template <typename Scalar, int kWarps>
cudaError_t launch_warps(const GateProblem& a, int slabs, cudaStream_t stream) {
  return launch_clusters(gate_kernel<Scalar, kWarps>, slabs, a.splits, 32 * kWarps,
                         Memory<kWarps>::kBytes, stream, a);
}

// With clusters as many blocks as the processors hold, but no warp of few stages; without, larger
// blocks, one for each slab.
template <typename Scalar>
cudaError_t launch(GateProblem a, cudaStream_t stream) {
  cudaFuncAttributes compiled = {};
  const cudaError_t error = cudaFuncGetAttributes(&compiled, gate_kernel<Scalar, 4>);
  if (error != cudaSuccess) return error;
  const int slabs = static_cast<int>(geglu_lora_slabs(8 * a.columns));
  a.splits = 1;
  if (compiled.ptxVersion < kFirstWithClusters) return launch_warps<Scalar, 8>(a, slabs, stream);
  const int steps = (static_cast<int>(a.tokens) + 4 * kStep - 1) / (4 * kStep);
  const int held = kClusterBlocks * multiprocessors();
  while (a.splits < kMostOfCluster && 4 * a.splits <= steps && (a.splits + 1) * slabs <= held) {
    ++a.splits;
  }
  return launch_warps<Scalar, 4>(a, slabs, stream);
}

}  // namespace

const char* launch_geglu_lora(const GegluLoraArguments& arguments, void* stream) {
  if (arguments.rows == 0 || arguments.width == 0) return nullptr;
  using Any = __half;  // of all types of 16 bits a vector has as many
  GateProblem a = {};
  a.da = rows_of<Any>(arguments.da, arguments.da_stride);
  a.u = rows_of<Any>(arguments.u, arguments.u_stride);
  a.du = rows_of<Any>(arguments.du, arguments.du_stride);
  a.p = rows_of<Any>(arguments.p, arguments.p_stride);
  a.h = rows_of<Any>(arguments.h, arguments.h_stride);
  a.d_down = arguments.d_down;
  a.d_up = arguments.d_up;
  a.tokens = static_cast<uint32_t>(arguments.rows);
  a.columns = static_cast<int>(arguments.width / 8);
  a.out_rank = static_cast<int>(arguments.out_rank);
  a.in_rank = static_cast<int>(arguments.in_rank);
  a.out_vectors = static_cast<int>(arguments.out_ranks / 8);
  a.in_vectors = static_cast<int>(arguments.in_ranks / 8);
  a.up = rows_of<Any>(arguments.up, arguments.up_stride);
  a.parts = static_cast<float*>(arguments.work);
  const uint32_t pairs = static_cast<uint32_t>(arguments.in_ranks / 2);
  const uint32_t blocks = (a.tokens * pairs + kSumThreads - 1) / kSumThreads;
  const int slabs = static_cast<int>(geglu_lora_slabs(arguments.width));
  const Rows<uint32_t> tail = {static_cast<uint32_t*>(arguments.du) + arguments.width,
                               arguments.du_stride / 2};
  cudaError_t error = cudaSuccess;
  const char* queued = with_half_type(arguments.type, [&]<typename Scalar>() {
    error = launch<Scalar>(a, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return;
    sum_kernel<Scalar><<<blocks, kSumThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const float2*>(arguments.work), static_cast<uint32_t*>(arguments.hidden), tail,
        arguments.scale, a.tokens, pairs, slabs);
  });
  return error == cudaSuccess ? queued : cudaGetErrorString(error);
}

}  // namespace eri
