// A block takes 8 * kTokens tokens and up to 16 * kRanks ranks of a group, 128 numbers of each at a
// time, through a ring of stages in shared memory. Each of its warps multiplies 16 of the 128; in
// the end they add up their sums in a fixed order. Rows that are joined lie elsewhere, group by
// group: the thread that copied a vector into a stage stores it where it belongs.

#include "launch.h"
#include "lora_products.h"
#include "tensor_cores.h"

namespace eri {
namespace {

struct Down {
  uint4* rows;
  const uint4* down;
  void* hidden;
  int64_t tokens;
  int64_t stride;  // vectors of a row
  int64_t down_stride;
  bool has_tail;
  float scale;
  int width;       // vectors of a group
  int ranks;       // of a group
  int groups;      //
  int parts;       // blocks that share the ranks of a group
  const uint4* sources[kLoraJoined];  // of rows that are joined, each group's
  int64_t source_strides[kLoraJoined];
};

constexpr int kWarps = 8;
constexpr int kVectors = 2 * kWarps;  // of a row in a stage: a warp multiplies two of them

// Rows of a stage: tokens, then ranks. A row's vectors are permuted within eight by its number, so
// that eight rows' vectors of one column lie in different banks.
template <int kRanks, int kTokens, int kStages>
struct Tile {
  static constexpr int kRows = 8 * kTokens + 16 * kRanks;
  static constexpr int kStage = kRows * kVectors * 16;  // bytes
  static constexpr int kRow = 16 * kRanks + 4;  // sums of a token, without bank conflicts
  static constexpr int kSums = kWarps / 2 * 8 * kTokens * kRow * 4;
  static constexpr int kBytes = kStages * kStage > kSums ? kStages * kStage : kSums;

  __device__ static __forceinline__ uint32_t at(int row, int vector) {
    return (row * kVectors + (vector ^ (row % 8))) * 16;
  }
};

// Tokens and ranks that are not there repeat the last one and are not written.
template <typename Scalar, int kRanks, int kTokens, int kStages, bool kJoins>
__global__ void __launch_bounds__(32 * kWarps) down_kernel(const __grid_constant__ Down a) {
  using Memory = Tile<kRanks, kTokens, kStages>;
  extern __shared__ uint4 memory[];
  const uint32_t ring = shared_address(memory);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int group = static_cast<int>(blockIdx.y) / a.parts;
  const int first_rank = static_cast<int>(blockIdx.y) % a.parts * 16 * kRanks;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * 8 * kTokens;

  // a thread copies one vector of every sixteenth row
  constexpr int kTokenCopies = (kTokens + 1) / 2;
  const int copied_row = thread / kVectors, copied = thread % kVectors;
  const uint4* tokens[kTokenCopies];
  uint4* joined[kTokenCopies];  // where it stores them; null: another thread does, or none
#pragma unroll
  for (int i = 0; i < kTokenCopies; ++i) {
    const int64_t token = min(first_token + 16 * i + copied_row, a.tokens - 1);
    uint4* place = a.rows + token * a.stride + static_cast<int64_t>(group) * a.width + copied;
    tokens[i] = place;
    if constexpr (kJoins) {
      tokens[i] = a.sources[group] + token * a.source_strides[group] + copied;
      const bool stores = first_rank == 0 && first_token + 16 * i + copied_row < a.tokens &&
                          (kTokens > 1 || copied_row < 8);
      joined[i] = stores ? place : nullptr;
    }
  }
  const uint4* ranks[kRanks];
#pragma unroll
  for (int i = 0; i < kRanks; ++i) {
    const int rank = min(first_rank + 16 * i + copied_row, a.ranks - 1);
    ranks[i] = a.down + (group * a.ranks + rank) * a.down_stride + copied;
  }
  const int steps = (a.width + kVectors - 1) / kVectors;
  const auto fetch = [&](int step, int stage) {
    if (step < steps) {
      const uint32_t to = ring + stage * Memory::kStage;
      const bool there = step * kVectors + copied < a.width;
#pragma unroll
      for (int i = 0; i < kTokenCopies; ++i) {
        if (kTokens > 1 || copied_row < 8) {
          copy_async(to + Memory::at(16 * i + copied_row, copied), tokens[i] + step * kVectors,
                     !there);
        }
      }
#pragma unroll
      for (int i = 0; i < kRanks; ++i) {
        copy_async(to + Memory::at(8 * kTokens + 16 * i + copied_row, copied),
                   ranks[i] + step * kVectors, !there);
      }
    }
    end_of_stage();
  };
  const auto join = [&](int step, int stage) {  // what this thread has copied
    if (step * kVectors + copied >= a.width) return;
    const uint4* from = memory + stage * (Memory::kStage / 16);
#pragma unroll
    for (int i = 0; i < kTokenCopies; ++i) {
      if (joined[i] != nullptr) {
        joined[i][step * kVectors] = from[Memory::at(16 * i + copied_row, copied) / 16];
      }
    }
  };

  float sums[kRanks][kTokens][4] = {};
  const auto add = [&](int stage) {
    const uint32_t from = ring + stage * Memory::kStage;
    uint32_t a_ranks[kRanks][4];
#pragma unroll
    for (int m = 0; m < kRanks; ++m) {  // ranks 0 to 7, 8 to 15 of numbers 0 to 7, then 8 to 15
      load_matrices(a_ranks[m],
                    from + Memory::at(8 * kTokens + 16 * m + lane % 16, 2 * warp + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < kTokens; n += 2) {  // numbers 0 to 7, 8 to 15 of eight tokens, then eight
      const int row = kTokens > 1 ? lane % 8 + lane / 16 * 8 : lane % 8;
      uint32_t b[4];
      load_matrices(b, from + Memory::at(8 * n + row, 2 * warp + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < kRanks; ++m) {
        multiply_add<Scalar>(sums[m][n], a_ranks[m], b[0], b[1]);
        if (kTokens > 1) multiply_add<Scalar>(sums[m][(n + 1) % kTokens], a_ranks[m], b[2], b[3]);
      }
    }
  };

#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage, stage);
#pragma unroll 1
  for (int step = 0, stage = 0; step < steps; ++step) {
    wait_for_stage<kStages - 2>();
    __syncthreads();  // all have copied this stage, and all are done with the one before it
    fetch(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    if constexpr (kJoins) join(step, stage);
    add(stage);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  __syncthreads();

  // the upper half of the warps, then the lower half onto it: half the shared memory
  constexpr int kRow = Memory::kRow;
  float* partial = reinterpret_cast<float*>(memory);
  float* mine = partial + warp % (kWarps / 2) * 8 * kTokens * kRow + lane % 4 * 2 * kRow + lane / 4;
  const auto each = [&](auto visit) {
#pragma unroll
    for (int m = 0; m < kRanks; ++m) {
#pragma unroll
      for (int n = 0; n < kTokens; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          visit(mine[(8 * n + i % 2) * kRow + 16 * m + 8 * (i / 2)], sums[m][n][i]);
        }
      }
    }
  };
  if (warp >= kWarps / 2) each([](float& shared, float sum) { shared = sum; });
  __syncthreads();
  if (warp < kWarps / 2) each([](float& shared, float sum) { shared += sum; });
  __syncthreads();

  uint32_t* hidden = static_cast<uint32_t*>(a.hidden);
  uint32_t* tail = reinterpret_cast<uint32_t*>(a.rows + static_cast<int64_t>(a.groups) * a.width);
  const int all = a.groups * a.ranks / 2;  // words of a row
  for (int pair = thread; pair < 64 * kTokens * kRanks; pair += 32 * kWarps) {
    const int token = pair / (8 * kRanks), rank = 2 * (pair % (8 * kRanks));
    if (first_token + token >= a.tokens || first_rank + rank >= a.ranks) continue;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kWarps / 2; ++i) {
      const float2 other = *reinterpret_cast<const float2*>(
          partial + (i * 8 * kTokens + token) * kRow + rank);
      sum.x += other.x, sum.y += other.y;
    }
    sum.x *= a.scale, sum.y *= a.scale;
    const uint32_t word = pack_pair<Scalar>(sum.x, sum.y);
    const int column = (group * a.ranks + first_rank + rank) / 2;
    hidden[(first_token + token) * all + column] = word;
    if (a.has_tail) tail[(first_token + token) * 4 * a.stride + column] = word;
  }
}

// float32, on no tensor cores: a warp a token, and eight ranks.
constexpr int kFloatWarps = 8;

__global__ void __launch_bounds__(32 * kFloatWarps) float_down_kernel(const Down a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kFloatWarps + threadIdx.x / 32;
  if (token >= a.tokens) return;
  const int first_rank = static_cast<int>(blockIdx.y) * 8;  // of all groups
  const int group = first_rank / a.ranks;
  const float4* row = reinterpret_cast<const float4*>(a.rows) + token * a.stride +
                      static_cast<int64_t>(group) * a.width;
  const float4* down = reinterpret_cast<const float4*>(a.down) +
                       first_rank * a.down_stride;
  float sums[8] = {};
  for (int column = lane; column < a.width; column += 32) {
    const float4 x = row[column];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 w = __ldg(down + i * a.down_stride + column);
      sums[i] = fmaf(x.x, w.x, fmaf(x.y, w.y, fmaf(x.z, w.z, fmaf(x.w, w.w, sums[i]))));
    }
  }
  const int all = a.groups * a.ranks;
  float* hidden = static_cast<float*>(a.hidden) + token * all + first_rank;
  float* tail = reinterpret_cast<float*>(a.rows + token * a.stride +
                                         static_cast<int64_t>(a.groups) * a.width) + first_rank;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    for (int offset = 16; offset > 0; offset /= 2) {
      sums[i] += __shfl_xor_sync(~0u, sums[i], offset);
    }
    if (lane != 0) continue;
    hidden[i] = a.scale * sums[i];
    if (a.has_tail) tail[i] = hidden[i];
  }
}

template <typename Scalar, int kRanks, int kTokens, int kStages, bool kJoins>
cudaError_t launch_tiles(Down a, cudaStream_t stream) {
  a.parts = (a.ranks + 16 * kRanks - 1) / (16 * kRanks);
  const int64_t tiles = (a.tokens + 8 * kTokens - 1) / (8 * kTokens);
  const dim3 blocks(static_cast<uint32_t>(tiles), static_cast<uint32_t>(a.groups * a.parts));
  const auto kernel = down_kernel<Scalar, kRanks, kTokens, kStages, kJoins>;
  constexpr int kBytes = Tile<kRanks, kTokens, kStages>::kBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, 32 * kWarps, kBytes, stream>>>(a);
  return cudaSuccess;
}

// Measured on an H200: the more tokens there are, the more of them a block takes, so that `down` is
// read less often, as long as there are blocks for all processors. Joined rows take as many.
template <typename Scalar, int kRanks, bool kJoins>
cudaError_t launch_ranks(const Down& a, cudaStream_t stream) {
  const int64_t tokens = a.tokens * a.groups;
  if (tokens >= (kRanks == 1 ? 8192 : 3072)) {
    return launch_tiles<Scalar, kRanks, 4, 4, kJoins>(a, stream);
  }
  if constexpr (kRanks == 1) {
    if (tokens >= 2048) return launch_tiles<Scalar, kRanks, 2, 6, kJoins>(a, stream);
  }
  return launch_tiles<Scalar, kRanks, 1, 6, kJoins>(a, stream);
}

template <typename Scalar, bool kJoins>
cudaError_t launch(const Down& a, cudaStream_t stream) {
  const int parts = (a.ranks + 47) / 48, ranks = (a.ranks + parts - 1) / parts;
  if (ranks <= 16) return launch_ranks<Scalar, 1, kJoins>(a, stream);
  if (ranks <= 32) return launch_ranks<Scalar, 2, kJoins>(a, stream);
  return launch_ranks<Scalar, 3, kJoins>(a, stream);
}

template <>
cudaError_t launch<float, false>(const Down& a, cudaStream_t stream) {
  const dim3 blocks(static_cast<uint32_t>((a.tokens + kFloatWarps - 1) / kFloatWarps),
                    static_cast<uint32_t>(a.groups * a.ranks / 8));
  float_down_kernel<<<blocks, 32 * kFloatWarps, 0, stream>>>(a);
  return cudaSuccess;
}

}  // namespace

const char* launch_lora_down(const LoraDownArguments& arguments, void* stream) {
  if (arguments.tokens == 0) return nullptr;
  const int64_t vector = vector_size(arguments.type);
  Down a = {};
  a.rows = static_cast<uint4*>(arguments.rows);
  a.down = static_cast<const uint4*>(arguments.down);
  a.hidden = arguments.hidden;
  a.tokens = arguments.tokens;
  a.stride = arguments.stride / vector;
  a.down_stride = arguments.down_stride / vector;
  a.has_tail = arguments.has_tail;
  a.scale = arguments.scale;
  a.width = static_cast<int>(arguments.width / vector);
  a.ranks = static_cast<int>(arguments.ranks);
  a.groups = static_cast<int>(arguments.groups);
  for (int i = 0; i < kLoraJoined; ++i) {
    a.sources[i] = static_cast<const uint4*>(arguments.sources[i]);
    a.source_strides[i] = arguments.source_strides[i] / vector;
  }
  cudaError_t error = cudaSuccess;
  const auto queue = static_cast<cudaStream_t>(stream);
  const bool joins = a.sources[0] != nullptr;
  const char* queued =
      joins ? with_half_type(arguments.type,
                             [&]<typename Scalar>() { error = launch<Scalar, true>(a, queue); })
            : with_type(arguments.type,
                        [&]<typename Scalar>() { error = launch<Scalar, false>(a, queue); });
  return error == cudaSuccess ? queued : cudaGetErrorString(error);
}

}  // namespace eri
