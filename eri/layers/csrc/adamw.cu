// Two passes over flat parameters: the norm with every decision of the step, then the update.
//
// No float atomics and no sum whose order depends on timing: the same input gives the same bits.

#include <cmath>

#include "adamw.h"
#include "launch.h"

namespace eri {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;      // float4 of each buffer that a thread of the update holds
constexpr int kMaxBlocks = 1024; // of the norm: one wave on large cards

struct alignas(16) Decision {  // what the first kernel leaves for the second
  int update;         // whether parameters change
  float gradient;     // factor of the gradient: clipping / loss scale
  float mean;         // 1 - beta1
  float square;       // 1 - beta2
  float root;         // 1 / sqrt(1 - beta2^t)
  float eps;          //
  float rate;         // lr / (1 - beta1^t)
  float decay;        // lr * weight_decay
};

struct Workspace {
  unsigned int arrived;         // blocks that have stored their sum; 0 between two launches
  Decision decision;            //
  double sums[kMaxBlocks];      // of squares, one a block
};
static_assert(sizeof(Workspace) <= kAdamwWorkspaceBytes, "the workspace is too small");

struct Settings {
  double beta1, beta2, eps, weight_decay, max_grad_norm;
  int64_t growth_interval;
};

// The sum over a block, in an order that never changes; valid in thread 0.
__device__ double block_sum(double value) {
  __shared__ double warps[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) value += warps[warp];
  }
  return value;
}

__device__ Decision decide(double squares, float* control, const Settings& settings) {
  const double exact_norm = sqrt(squares);
  const float norm = static_cast<float>(exact_norm);
  const float scale = control[kScale];
  const bool scaling = settings.growth_interval > 0;
  Decision decision = {};
  control[kGradNorm] = norm;
  if (control[kBad] != 0.0f) return decision;
  if (isfinite(control[kLoss]) && isfinite(norm)) {
    const double lr = control[kLr];
    const double updates = static_cast<double>(control[kUpdates]) + 1.0;
    const double clip = fmin(1.0, settings.max_grad_norm / (exact_norm + 1e-6));
    decision.update = 1;
    decision.gradient = static_cast<float>(clip / static_cast<double>(scale));
    decision.mean = static_cast<float>(1.0 - settings.beta1);
    decision.square = static_cast<float>(1.0 - settings.beta2);
    decision.root = static_cast<float>(1.0 / sqrt(1.0 - pow(settings.beta2, updates)));
    decision.eps = static_cast<float>(settings.eps);
    decision.rate = static_cast<float>(lr / (1.0 - pow(settings.beta1, updates)));
    decision.decay = static_cast<float>(lr * settings.weight_decay);
    control[kUpdates] = static_cast<float>(updates);
    if (scaling) {
      const bool grow = control[kGrowth] + 1.0f >= static_cast<float>(settings.growth_interval);
      control[kGrowth] = grow ? 0.0f : control[kGrowth] + 1.0f;
      if (grow && isfinite(scale * 2.0f)) control[kScale] = scale * 2.0f;
    }
  } else if (scaling && isfinite(control[kLoss]) && scale >= 1.0f) {
    control[kScale] = scale * 0.5f;  // fp16 overflowed: this step is left out
    control[kGrowth] = 0.0f;
  } else {
    control[kBad] = control[kStep];
  }
  return decision;
}

__device__ float square_of(float value, float factor) {
  value *= factor;
  return value * value;
}

// The sum of squares; the block that finishes last adds up the blocks' sums and decides.
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const float* __restrict__ grad, int64_t n, float* control, Workspace* workspace,
                Settings settings) {
  const float unscale = 1.0f / control[kScale];
  const float4* vectors = reinterpret_cast<const float4*>(grad);
  const int64_t count = n / 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = first; i < count; i += stride) {
    const float4 g = vectors[i];
    // four in fp32, then double: GeForce cards do few double operations
    sum += static_cast<double>(square_of(g.x, unscale) + square_of(g.y, unscale) +
                               square_of(g.z, unscale) + square_of(g.w, unscale));
  }
  if (first < n % 4) sum += static_cast<double>(square_of(grad[4 * count + first], unscale));

  __shared__ bool last;
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    workspace->sums[blockIdx.x] = sum;
    __threadfence();  // the sum is seen before the arrival is
    last = atomicAdd(&workspace->arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;

  __threadfence();
  double total = 0.0;
  for (int block = threadIdx.x; block < gridDim.x; block += kThreads) {
    total += __ldcg(&workspace->sums[block]);
  }
  total = block_sum(total);
  if (threadIdx.x == 0) {
    workspace->decision = decide(total, control, settings);
    workspace->arrived = 0;
  }
}

__device__ void update_one(float& p, float& m, float& v, float g, const Decision& with) {
  g *= with.gradient;
  m = fmaf(with.mean, g - m, m);
  v = fmaf(with.square, g * g - v, v);
  const float direction = m / fmaf(sqrtf(v), with.root, with.eps);
  p -= fmaf(with.decay, p, with.rate * direction);  // one rounding at the size of p
}

// The update, from the end of the buffers to their start: the norm has just read the gradient's
// end, which the L2 cache still holds.
__global__ void __launch_bounds__(kThreads)
    update_kernel(float* __restrict__ master, float* __restrict__ exp_avg,
                  float* __restrict__ exp_avg_sq, float* __restrict__ grad,
                  const Workspace* __restrict__ workspace, int64_t n) {
  const Decision with = workspace->decision;
  const int64_t block = gridDim.x - 1 - static_cast<int64_t>(blockIdx.x);
  const int64_t first = block * (kThreads * kVectors) + threadIdx.x;
  const int64_t count = n / 4;
  float4* masters = reinterpret_cast<float4*>(master);
  float4* means = reinterpret_cast<float4*>(exp_avg);
  float4* squares = reinterpret_cast<float4*>(exp_avg_sq);
  float4* grads = reinterpret_cast<float4*>(grad);

  float4 p[kVectors], m[kVectors], v[kVectors], g[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {  // all loads before the first use, the decision's too
    const int64_t i = first + k * kThreads;
    if (i < count) {
      g[k] = __ldcs(&grads[i]);
      p[k] = __ldcs(&masters[i]);
      m[k] = __ldcs(&means[i]);
      v[k] = __ldcs(&squares[i]);
    }
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t i = first + k * kThreads;
    if (with.update && i < count) {
      update_one(p[k].x, m[k].x, v[k].x, g[k].x, with);
      update_one(p[k].y, m[k].y, v[k].y, g[k].y, with);
      update_one(p[k].z, m[k].z, v[k].z, g[k].z, with);
      update_one(p[k].w, m[k].w, v[k].w, g[k].w, with);
      __stcs(&masters[i], p[k]);
      __stcs(&means[i], m[k]);
      __stcs(&squares[i], v[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t i = first + k * kThreads;
    if (i < count) grads[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  if (block == 0 && threadIdx.x < n % 4) {  // what is left of n / 4
    const int64_t i = 4 * count + threadIdx.x;
    if (with.update) {
      float p = master[i], m = exp_avg[i], v = exp_avg_sq[i];
      update_one(p, m, v, grad[i], with);
      master[i] = p;
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
    }
    grad[i] = 0.0f;
  }
}

void launch_update(const AdamwArguments& a, cudaStream_t stream) {
  const int64_t per_block = int64_t{4} * kVectors * kThreads;
  const int64_t blocks = (a.n + per_block - 1) / per_block;
  update_kernel<<<static_cast<unsigned int>(blocks), kThreads, 0, stream>>>(
      a.master, a.exp_avg, a.exp_avg_sq, a.grad, static_cast<const Workspace*>(a.workspace), a.n);
}

}  // namespace

const char* launch_adamw(const AdamwArguments& a, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const Settings settings = {a.beta1,        a.beta2,         a.eps,
                             a.weight_decay, a.max_grad_norm, a.growth_interval};
  const int64_t wanted = (a.n + 4 * kThreads - 1) / (4 * kThreads);
  const int64_t blocks = wanted < 1 ? 1 : (wanted > kMaxBlocks ? kMaxBlocks : wanted);
  norm_kernel<<<static_cast<unsigned int>(blocks), kThreads, 0, stream>>>(
      a.grad, a.n, a.control, static_cast<Workspace*>(a.workspace), settings);
  const char* error = launch_error();
  if (error == nullptr && a.n > 0) {
    launch_update(a, stream);
    error = launch_error();
  }
  return error;
}

}  // namespace eri
