// Both products are sums over the tokens: small^T wide, with x or dy as `wide` and p or h as
// `small`. A warp takes 64 columns of `wide`, 16 tokens at a time, through a ring of shared memory
// of its own. The warps of a block share its tokens and so do the blocks of a cluster (from sm_90
// on). All warps' sums of one number are added in a fixed order, by one thread.

#include "cluster.h"
#include "launch.h"
#include "lora_products.h"
#include "tensor_cores.h"

namespace eri {
namespace {

constexpr int kSlab = 64;                   // columns of a warp
constexpr int kSteps = 16;                  // tokens of a stage of the ring
constexpr int kWideBytes = kSteps * 2 * kSlab;  // of a stage
constexpr int kRow = kSlab + 4;             // sums of a rank in shared memory, fewer bank conflicts

struct Product {  // small^T wide, for each group of columns of `wide`
  const uint4* wide;
  const uint4* small;
  float* total;          // to which it is added
  int64_t wide_stride;   // vectors of a row
  int64_t small_stride;  //
  int width;             // of a group
  int groups;            //
  int ranks;             // of a group
  int slabs;             // blocks side by side on a group's columns
  int parts;             // blocks that share its ranks
  int blocks;            // all of them, of each split of the tokens
};

struct Gradient {
  Product down, up;
  int tokens;
  int rank, ranks;  // of a layer, the second padded
};

struct Gradients {
  Gradient of[kLoraGradients];
  int ends[kLoraGradients];  // blocks of all up to each, not counting splits
  int splits;                // of the tokens: blocks of a cluster
};

// Where the sum of a rank and a column of a group is added; null where it is only padding.
__device__ __forceinline__ float* place_of(const Gradient& a, bool is_down, int group, int rank,
                                           int column) {
  const Product& product = is_down ? a.down : a.up;
  if (column >= product.width || rank >= product.ranks) return nullptr;
  int layer = group, own = rank;
  if (a.rank != a.ranks) {  // ranks end in padding, those of each layer
    layer = is_down ? rank / a.ranks : group;
    own = is_down ? rank % a.ranks : rank;
    if (own >= a.rank) return nullptr;
    if (is_down) own += layer * a.rank;
  }
  return product.total + (is_down ? static_cast<int64_t>(own) * product.width + column
                                  : (static_cast<int64_t>(group) * product.width + column) * a.rank +
                                        own);
}

// What a block takes of one of the products.
struct Share {
  const Product& product;
  bool is_down;
  int group, slab, first_rank;
};

__device__ __forceinline__ Share share_of(const Gradient& a, int block, int ranks) {
  const bool is_down = block < a.down.blocks;
  const Product& product = is_down ? a.down : a.up;
  if (!is_down) block -= a.down.blocks;
  // blocks that read the same columns are neighbours
  return {product, is_down, block / product.parts / product.slabs,
          block / product.parts % product.slabs, block % product.parts * ranks};
}

template <int kRanks, int kStages>
struct Ring {  // of a warp
  static constexpr int kPitch = 32 * kRanks + 16;  // bytes of a row of `small`, against conflicts
  static constexpr int kStage = kWideBytes + kSteps * kPitch;
  static constexpr int kSums = kRanks * 16 * kRow * 4;
  static constexpr int kBytes = kStages * kStage > kSums ? kStages * kStage : kSums;
};

// kRanks tiles of 16 ranks.
template <typename Scalar, int kRanks, int kWarps, int kStages>
__global__ void __launch_bounds__(32 * kWarps)
    gradient_kernel(const __grid_constant__ Gradients all) {
  using Memory = Ring<kRanks, kStages>;
  extern __shared__ uint4 memory[];

  const int splits = all.splits, split = static_cast<int>(blockIdx.x) % splits;
  const int block = static_cast<int>(blockIdx.x) / splits;
  int which = 0;
  while (block >= all.ends[which]) ++which;
  const Gradient& a = all.of[which];
  const auto [product, is_down, group, slab, first_rank] =
      share_of(a, which == 0 ? block : block - all.ends[which - 1], 16 * kRanks);
  const int tiles = min((product.ranks - first_rank + 15) / 16, kRanks);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t ring = shared_address(memory) + warp * Memory::kBytes;

  // columns and ranks that are not there repeat the last ones and are added nowhere
  const int column = min(slab * 8 + lane % 8, product.width / 8 - 1);
  const int stride = splits * kWarps * kSteps;  // tokens
  int next = (split * kWarps + warp) * kSteps;    // token to fetch
  int left = next < a.tokens ? (a.tokens - next + stride - 1) / stride : 0;
  const uint4* wide = product.wide + static_cast<int64_t>(group) * (product.width / 8) + column +
                      (next + lane / 8) * product.wide_stride;
  const uint4* small = product.small + group * (product.ranks / 8) +
                       (next + lane / 2) * product.small_stride;
  const auto fetch = [&](int stage) {
    if (next < a.tokens) {
      const uint32_t to = ring + stage * Memory::kStage;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 4 * i + lane / 8;
        copy_async(to + row * 128 + ((lane % 8) ^ (row % 8)) * 16,
                   wide + 4 * i * product.wide_stride, next + row >= a.tokens);
      }
#pragma unroll
      for (int m = 0; m < kRanks; ++m) {
        if (m < tiles) {
          const int place = min(first_rank / 8 + 2 * m + lane % 2, product.ranks / 8 - 1);
          copy_async(to + kWideBytes + lane / 2 * Memory::kPitch + (2 * m + lane % 2) * 16,
                     small + place, next + lane / 2 >= a.tokens);
        }
      }
    }
    end_of_stage();
    next += stride;
    wide += stride * product.wide_stride;
    small += stride * product.small_stride;
  };

  float sums[kRanks][8][4] = {};
  const auto add = [&](int stage) {
    const uint32_t from = ring + stage * Memory::kStage;
    // matrices: ranks 0 to 7 and 8 to 15 of tokens 0 to 7, then of tokens 8 to 15
    const uint32_t at = from + kWideBytes + (lane % 8 + lane / 16 * 8) * Memory::kPitch +
                        lane / 8 % 2 * 16;
    uint32_t ranks[kRanks][4];
#pragma unroll
    for (int m = 0; m < kRanks; ++m) {
      if (m < tiles) load_transposed(ranks[m], at + 32 * m);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      // tokens 0 to 7 and 8 to 15 of columns 16n to 16n + 7, then of the next eight
      uint32_t columns[4];
      const int row = lane % 16;
      load_transposed(columns, from + row * 128 + ((2 * n + lane / 16) ^ (row % 8)) * 16);
#pragma unroll
      for (int m = 0; m < kRanks; ++m) {
        if (m < tiles) {
          multiply_add<Scalar>(sums[m][2 * n], ranks[m], columns[0], columns[1]);
          multiply_add<Scalar>(sums[m][2 * n + 1], ranks[m], columns[2], columns[3]);
        }
      }
    }
  };

#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage);
#pragma unroll 1
  for (int stage = 0; left > 0; --left) {
    wait_for_stage<kStages - 2>();
    __syncwarp();
    fetch(stage == 0 ? kStages - 1 : stage - 1);
    add(stage);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  wait_for_stage<0>();
  __syncwarp();

  float* shared = reinterpret_cast<float*>(memory);
  float* mine = shared + warp * (Memory::kBytes / 4) + lane / 4 * kRow + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < kRanks; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      float2* to = reinterpret_cast<float2*>(mine + 16 * m * kRow + 8 * n);
      to[0] = make_float2(sums[m][n][0], sums[m][n][1]);
      to[4 * kRow] = make_float2(sums[m][n][2], sums[m][n][3]);
    }
  }
  __syncthreads();
  for (int place = static_cast<int>(threadIdx.x); place < tiles * 16 * (kSlab / 4);
       place += 32 * kWarps) {
    float4* to = reinterpret_cast<float4*>(shared + place / (kSlab / 4) * kRow) +
                 place % (kSlab / 4);
    float4 sum = *to;
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      const float4 other = to[w * (Memory::kBytes / 16)];
      sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
    }
    *to = sum;
  }
  wait_for_cluster(splits);
#pragma unroll 4
  for (int place = split * 32 * kWarps + static_cast<int>(threadIdx.x); place < tiles * 16 * kSlab;
       place += splits * 32 * kWarps) {
    // side by side as they lie in the result
    const int rank = is_down ? place / kSlab : place / (16 * kSlab) * 16 + place % 16;
    const int at = is_down ? place % kSlab : place / 16 % kSlab;
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < splits; ++i) {
      sum += *shared_of_cluster(shared + rank * kRow + at, i, splits);
    }
    float* to = place_of(a, is_down, group, first_rank + rank, slab * kSlab + at);
    // nothing else is added there, so no order can change it; no thread waits for what was there
    if (to != nullptr) atomicAdd(to, sum);
  }
  wait_for_cluster(splits);  // nobody's shared memory goes before all have read it
}

// float32, on no tensor cores: a thread a column, and eight ranks; the warps share the tokens.
constexpr int kFloatWarps = 8, kFloatRanks = 8, kFloatSlab = 32;

__global__ void __launch_bounds__(32 * kFloatWarps)
    float_gradient_kernel(const __grid_constant__ Gradient a) {
  __shared__ float partial[kFloatWarps][kFloatRanks][kFloatSlab];
  const auto [product, is_down, group, slab, first_rank] =
      share_of(a, static_cast<int>(blockIdx.x), kFloatRanks);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int column = slab * kFloatSlab + lane;
  const float* wide = reinterpret_cast<const float*>(product.wide) +
                      static_cast<int64_t>(group) * product.width +
                      min(column, product.width - 1);
  const float4* small = reinterpret_cast<const float4*>(product.small) +
                        (group * product.ranks + first_rank) / 4;
  float sums[kFloatRanks] = {};
  for (int token = warp; token < a.tokens;) {
    float few[kFloatRanks] = {};  // long sums are added up in parts, which is more exact
    const int end = min(token + 64 * kFloatWarps, a.tokens);
#pragma unroll 2
    for (; token < end; token += kFloatWarps) {
      const float value = __ldg(wide + token * (4 * product.wide_stride));
      const float4 first = __ldg(small + token * product.small_stride);
      const float4 second = __ldg(small + token * product.small_stride + 1);
      const float ranks[] = {first.x,  first.y,  first.z,  first.w,
                             second.x, second.y, second.z, second.w};
#pragma unroll
      for (int i = 0; i < kFloatRanks; ++i) few[i] = fmaf(ranks[i], value, few[i]);
    }
#pragma unroll
    for (int i = 0; i < kFloatRanks; ++i) sums[i] += few[i];
  }
#pragma unroll
  for (int i = 0; i < kFloatRanks; ++i) partial[warp][i][lane] = sums[i];
  __syncthreads();
  static_assert(kFloatWarps == kFloatRanks, "a warp adds up the sums of a rank");
  float sum = 0.0f;
  for (int i = 0; i < kFloatWarps; ++i) sum += partial[i][warp][lane];
  float* to = place_of(a, is_down, group, first_rank + warp, column);
  if (to != nullptr) atomicAdd(to, sum);  // alone, as above
}

// Blocks that take `ranks` ranks of `slab` columns each; how many there are.
int share_out(Gradient& a, int slab, int ranks) {
  for (Product* product : {&a.down, &a.up}) {
    product->slabs = (product->width + slab - 1) / slab;
    product->parts = (product->ranks + ranks - 1) / ranks;
    product->blocks = product->slabs * product->parts * product->groups;
  }
  return a.down.blocks + a.up.blocks;
}

// As many blocks as there are processors, but no warp of one stage; where the kernel was compiled
// without clusters, no more than there are shares, whatever the card could do.
template <typename Scalar, int kRanks, int kWarps, int kStages>
cudaError_t launch_ranks(Gradients all, int count, cudaStream_t stream) {
  cudaFuncAttributes compiled = {};
  const cudaError_t error =
      cudaFuncGetAttributes(&compiled, gradient_kernel<Scalar, kRanks, kWarps, kStages>);
  if (error != cudaSuccess) return error;
  int blocks = 0, tokens = 0;
  for (int i = 0; i < count; ++i) {
    blocks += share_out(all.of[i], kSlab, 16 * kRanks);
    all.ends[i] = blocks;
    tokens = all.of[i].tokens > tokens ? all.of[i].tokens : tokens;
  }
  const int steps = (tokens + kSteps * kWarps - 1) / (kSteps * kWarps);
  all.splits = 1;
  while (compiled.ptxVersion >= kFirstWithClusters && all.splits < kMostOfCluster &&
         4 * all.splits <= steps && 2 * all.splits * blocks <= multiprocessors()) {
    all.splits *= 2;
  }
  return launch_clusters(gradient_kernel<Scalar, kRanks, kWarps, kStages>, blocks, all.splits,
                         32 * kWarps, kWarps * Ring<kRanks, kStages>::kBytes, stream, all);
}

template <typename Scalar>
cudaError_t launch(const Gradients& all, int count, cudaStream_t stream) {
  int ranks = 0;
  for (int i = 0; i < count; ++i) ranks = all.of[i].ranks > ranks ? all.of[i].ranks : ranks;
  if (ranks <= 16) return launch_ranks<Scalar, 1, 8, 4>(all, count, stream);
  return launch_ranks<Scalar, 2, 8, 3>(all, count, stream);
}

template <>
cudaError_t launch<float>(const Gradients& all, int count, cudaStream_t stream) {
  for (int i = 0; i < count; ++i) {
    Gradient shared = all.of[i];
    const int blocks = share_out(shared, kFloatSlab, kFloatRanks);
    float_gradient_kernel<<<static_cast<unsigned int>(blocks), 32 * kFloatWarps, 0, stream>>>(
        shared);
  }
  return cudaSuccess;
}

Gradient gradient_of(const LoraGradientArguments& arguments) {
  const int64_t vector = vector_size(arguments.type);
  const auto product = [&](const void* wide, const void* small, float* total, int64_t wide_stride,
                           int64_t small_stride) {
    Product found = {};
    found.wide = static_cast<const uint4*>(wide);
    found.small = static_cast<const uint4*>(small);
    found.total = total;
    found.wide_stride = wide_stride / vector;
    found.small_stride = small_stride / vector;
    return found;
  };
  Gradient a = {};
  a.down = product(arguments.x, arguments.p, arguments.d_down, arguments.x_stride,
                   arguments.p_stride);
  a.down.width = static_cast<int>(arguments.inputs);
  a.down.groups = 1;
  a.down.ranks = static_cast<int>(arguments.layers * arguments.ranks);
  a.up = product(arguments.dy, arguments.h, arguments.d_up, arguments.dy_stride,
                 arguments.h_stride);
  a.up.width = static_cast<int>(arguments.outputs);
  a.up.groups = static_cast<int>(arguments.layers);
  a.up.ranks = static_cast<int>(arguments.ranks);
  a.tokens = static_cast<int>(arguments.tokens);
  a.rank = static_cast<int>(arguments.rank);
  a.ranks = static_cast<int>(arguments.ranks);
  return a;
}

}  // namespace

const char* launch_lora_gradients(const LoraGradientArguments* arguments, int count,
                                  void* stream) {
  Gradients all = {};
  int kept = 0;
  for (int i = 0; i < count; ++i) {
    if (arguments[i].tokens == 0 || arguments[i].inputs + arguments[i].outputs == 0) continue;
    all.of[kept++] = gradient_of(arguments[i]);
  }
  if (kept == 0) return nullptr;
  cudaError_t error = cudaSuccess;
  const char* queued = with_type(arguments[0].type, [&]<typename Scalar>() {
    error = launch<Scalar>(all, kept, static_cast<cudaStream_t>(stream));
  });
  return error == cudaSuccess ? queued : cudaGetErrorString(error);
}

}  // namespace eri
